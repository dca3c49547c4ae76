"""Recipes: from raw data to a trained model in one call, resumable, and the figures that judge the result."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from minildm.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    make_autoencoder,
    perplexity,
)
from minildm.data import (
    MNIST_SHA256,
    DataError,
    StrokeWords,
    load_mnist,
    pick_device,
    sha256,
    to_float,
    write_atomically,
)
from minildm.judge import DigitClassifier, classifier_loss, frechet_distance, predict
from minildm.losses import (
    FeatureNet,
    FirstStage,
    Objective,
    PatchDiscriminator,
    feature_net_loss_fn,
    first_stage_loss_fn,
    objective_loss_fn,
    perceptual_distance,
    psnr,
    ssim,
)
from minildm.metrics import Reference, measure
from minildm.muon import start_muon
from minildm.pipeline import (
    LatentDiffusion,
    LDMConfig,
    config_from_dict,
    encode_all,
    load_model,
    read_model,
    save_model,
    second_stage_loss_fn,
    weights_root,
)
from minildm.training import (
    Budget,
    TrainState,
    load_checkpoint,
    progress_line,
    read_safetensors,
    save_checkpoint,
    train,
)
from minildm.unet import UNetConfig

CHECKPOINT_SECONDS = 20
SAVING_SECONDS = 6  # set aside of a budget in minutes for the imports and for writing the model
ON_THE_WAY = ("checkpoint", "first_stage", "second_stage", "latents")  # what a run keeps to go on from


@dataclass(frozen=True)
class Stage:
    """How a stage is trained with AdamW: images a step, peak learning rate, decay of the EMA and of the weights."""

    batch_size: int
    lr: float
    ema_decay: float = 0.999
    weight_decay: float = 0.0


@dataclass(frozen=True)
class MuonStage:
    """How a stage is trained with Muon: images a step, peak learning rate, decay of the EMA."""

    batch_size: int
    lr: float
    ema_decay: float = 0.999


@dataclass(frozen=True)
class TextRecipe:
    """Text to image on MNIST with captions, both stages; the first takes `first_share` of the budget.

    The second stage draws its steps with `logit_normal`, as in `diffusion_loss`.
    """

    config: LDMConfig
    first: MuonStage
    second: MuonStage
    first_share: float = 0.2
    kl_weight: float = 1e-6
    logit_normal: tuple[float, float] | None = None
    seed: int = 0


@dataclass(frozen=True)
class ClassifierRecipe:
    """The digit classifier that judges samples."""

    stage: Stage = field(default_factory=lambda: Stage(128, 2e-3, 0.995, 1e-2))
    seed: int = 1


@dataclass(frozen=True)
class FeaturesRecipe:
    """The small classifier whose layers measure perceptual distance; not the judge."""

    stage: Stage = field(default_factory=lambda: Stage(128, 4e-3, 0.98))
    seed: int = 2


@dataclass(frozen=True)
class AutoencoderRecipe:
    """A first stage alone, by the whole objective: reconstruction, perceptual, regularisation, adversary."""

    config: AutoencoderConfig
    stage: Stage = field(default_factory=lambda: Stage(batch_size=16, lr=4e-3, ema_decay=0.99))
    objective: Objective = Objective(perceptual=0.05, adversarial=0.05, start=0.7)
    seed: int = 0


Recipe = TextRecipe | ClassifierRecipe | FeaturesRecipe | AutoencoderRecipe

# Widths for each compression factor, in multiples of 8: for about as many steps in the same time, and not for as many
# parameters, since a layer at 32×32 costs four times as much as the same layer at 16×16.
FIRST_STAGE_WIDTHS = {1: (2,), 2: (2, 4), 4: (1, 2, 4), 8: (1, 2, 4, 4)}
CODES = 256


def first_stage_recipe(factor: int, kind: str) -> AutoencoderRecipe:
    """The first stage with compression factor 1, 2, 4 or 8 and as many latent channels, `kind` "kl" or "vq".

    Raises ValueError for another factor or kind.
    """
    if factor not in FIRST_STAGE_WIDTHS or kind not in ("kl", "vq"):
        raise ValueError(f"a first stage has a factor of 1, 2, 4 or 8 and is kl or vq, not {factor} and {kind}.")
    codes = CODES if kind == "vq" else 0
    return AutoencoderRecipe(
        AutoencoderConfig(
            latent_channels=factor, channels=8, multipliers=FIRST_STAGE_WIDTHS[factor], groups=4, codes=codes
        )
    )


RECIPES: dict[str, Recipe] = {
    "mnist-text": TextRecipe(
        config=LDMConfig(
            autoencoder=AutoencoderConfig(latent_channels=3, channels=16, multipliers=(1, 2, 2), groups=4, patch=2),
            unet=UNetConfig(
                in_channels=3,
                out_channels=3,
                channels=48,
                multipliers=(1, 1),
                attention=(True, False),
                context_dim=64,
                ff_multiplier=2,
                groups=8,
                scale_shift=True,
                pooled=True,
            ),
            schedule="cosine",
            target="v",
        ),
        first=MuonStage(batch_size=16, lr=1e-2, ema_decay=0.99),
        second=MuonStage(batch_size=128, lr=1.4e-2, ema_decay=0.995),
        first_share=0.2,
        kl_weight=1e-2,
        logit_normal=(-0.5, 0.8),
    ),
    "mnist-classifier": ClassifierRecipe(),
    "mnist-features": FeaturesRecipe(),
    "mnist-kl-f4": first_stage_recipe(4, "kl"),
    "mnist-vq-f4": first_stage_recipe(4, "vq"),
}


def find_recipe(name: str) -> Recipe:
    """A recipe by its name. Raises ValueError that lists the names."""
    if name not in RECIPES:
        raise ValueError(f'there is no recipe "{name}": choose one of {", ".join(RECIPES)}.')
    return RECIPES[name]


def run_stage(
    name: str, state: TrainState, loss_fn: Callable, budget: Budget, lr: float, checkpoint: Path, resume: bool
) -> None:
    """Train one stage with a progress line, a checkpoint every 20 seconds and at the end; goes on from it on resume.

    An interruption saves nothing: it may come in the middle of a step, when half of the state is that of the next one.
    """
    if resume and checkpoint.exists():
        load_checkpoint(state, checkpoint)
    live, saved, shown = sys.stdout.isatty(), time.monotonic(), 0.0
    for _ in train(state, loss_fn, budget, lr):
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(state, checkpoint)
            saved = time.monotonic()
        done = budget.progress(state.step, state.elapsed)
        if done >= shown + (0.002 if live else 0.1):
            print(progress_line(name, state, budget), end="\r" if live else "\n", flush=True)
            shown = done
    save_checkpoint(state, checkpoint)
    if live:
        print(progress_line(name, state, budget), flush=True)


def start_run(out: Path, name: str, budget: Budget, resume: bool) -> dict:
    """Make the output folder and its run.json, or check that a run to resume is of the same recipe and budget.

    A new run removes what an old one without its run.json has left to go on from: a resume would take it for its own.
    Raises ValueError when the folder holds another run, or one and resume is not set; DataError when there is none.
    """
    plan = {"recipe": name, "steps": budget.steps, "seconds": budget.seconds}
    path = out / "run.json"
    if resume:
        if not path.exists():
            raise DataError(f"{out} holds no run to resume: leave out --resume to start one.")
        try:
            before = json.loads(path.read_text())
        except ValueError:
            raise DataError(f"{path} is damaged: start a new run in another folder.") from None
        if before != plan:
            raise ValueError(f"{out} holds a run of {before}, not of {plan}: resume with the same recipe and budget.")
    elif path.exists():
        raise ValueError(f"{out} already holds a run: add --resume to go on with it, or give another folder.")
    else:
        for part in ON_THE_WAY:
            if (left := out / f"{part}.safetensors").exists():
                left.unlink()
    write_atomically(path, lambda file: file.write_text(json.dumps(plan)))
    return plan


def train_recipe(name: str, out: Path | str, budget: Budget, resume: bool = False) -> Path:
    """Train a recipe from raw data within the budget (all stages together) and write the model into the folder `out`.

    Killed at any moment, it goes on from its last checkpoint with `resume`: bit-exactly where the budget counts steps;
    one of seconds lets the clock set the learning rate. The folder gets the weights, config.json, a card.json that says
    how they were made, and the checkpoints.
    """
    out, recipe = Path(out), find_recipe(name)
    start_run(out, name, budget, resume)
    trainer = {
        TextRecipe: train_text,
        ClassifierRecipe: train_classifier,
        FeaturesRecipe: train_features,
        AutoencoderRecipe: train_autoencoder,
    }
    weights = out / "model.safetensors"
    before = sha256(weights) if weights.exists() else None
    made = trainer[type(recipe)](recipe, out, budget, resume)
    metrics = metrics_in_card(out) if sha256(weights) == before else {}  # a finished run was resumed
    write_card(out, name, recipe, budget, made, metrics)
    return out


def train_classifier(recipe: ClassifierRecipe, out: Path, budget: Budget, resume: bool) -> dict:
    """Train the judge; returns what the card says of the training."""
    data, stage = load_mnist(), recipe.stage
    torch.manual_seed(recipe.seed)
    state = TrainState.start(
        DigitClassifier().to(pick_device()), stage.lr, recipe.seed, stage.weight_decay, stage.ema_decay
    )
    loss_fn = classifier_loss(data.x_train, data.y_train, stage.batch_size)
    run_stage("classifier", state, loss_fn, budget, stage.lr, out / "checkpoint.safetensors", resume)
    save_model(state.ema.model, {}, out)
    read, _ = predict(state.ema.model, to_float(data.x_test))
    accuracy = (read == data.y_test).float().mean().item()
    print(f"test accuracy {accuracy:.2%}")
    return {"steps": state.step, "seconds": round(state.elapsed), "test_accuracy": round(accuracy, 4)}


def train_features(recipe: FeaturesRecipe, out: Path, budget: Budget, resume: bool) -> dict:
    """Train the FeatureNet of the perceptual distance; returns what the card says of the training."""
    data, stage = load_mnist(), recipe.stage
    torch.manual_seed(recipe.seed)
    net = FeatureNet().to(pick_device(), memory_format=torch.channels_last)
    state = TrainState.start(net, stage.lr, recipe.seed, stage.weight_decay, stage.ema_decay)
    loss_fn = feature_net_loss_fn(data.x_train, data.y_train, stage.batch_size)
    run_stage("features", state, loss_fn, budget, stage.lr, out / "checkpoint.safetensors", resume)
    save_model(state.ema.model, {}, out)
    with torch.no_grad():
        read = torch.cat(
            [state.ema.model(x.to(pick_device())).argmax(1).cpu() for x in to_float(data.x_test).split(500)]
        )
    accuracy = (read == data.y_test).float().mean().item()
    print(f"test accuracy {accuracy:.2%}")
    return {"steps": state.step, "seconds": round(state.elapsed), "test_accuracy": round(accuracy, 4)}


def train_autoencoder(recipe: AutoencoderRecipe, out: Path, budget: Budget, resume: bool) -> dict:
    """A first stage alone, the average of its weights and its latents' statistics; returns what the card says of it."""
    data, stage, objective = load_mnist(), recipe.stage, recipe.objective
    torch.manual_seed(recipe.seed)
    discriminator = PatchDiscriminator(recipe.config.in_channels) if objective.adversarial else None
    model = FirstStage(make_autoencoder(recipe.config), discriminator)
    model.to(pick_device(), memory_format=torch.channels_last)
    state = TrainState.start(model, stage.lr, recipe.seed, stage.weight_decay, stage.ema_decay)
    net = load_features().to(pick_device()) if objective.perceptual else None
    loss_fn = objective_loss_fn(
        data.x_train, stage.batch_size, objective, net, lambda: budget.progress(state.step, state.elapsed)
    )
    run_stage("autoencoder", state, loss_fn, budget, stage.lr, out / "checkpoint.safetensors", resume)
    autoencoder = state.ema.model.autoencoder
    autoencoder.set_latent_statistics(encode_all(autoencoder, data.x_train))
    save_model(autoencoder, asdict(autoencoder.config), out)
    return {"steps": state.step, "seconds": round(state.elapsed)}


def train_text(recipe: TextRecipe, out: Path, budget: Budget, resume: bool) -> dict:
    """Both stages of a text-to-image model; returns what the card says of the training."""
    start, data = time.monotonic(), load_mnist()
    torch.manual_seed(recipe.seed)
    model = LatentDiffusion(recipe.config).to(pick_device())
    loading = time.monotonic() - start
    first = train_first_stage(recipe, model.autoencoder, data.x_train, out, budget.share(recipe.first_share), resume)
    start = time.monotonic() - first.elapsed - loading  # counts what a run that was killed had spent, too
    model.autoencoder.load_state_dict(first.ema.model.state_dict())
    captions = StrokeWords.measure(data.x_train, data.y_train).captions(data.x_train, data.y_train)
    latents, spent = cached_latents(model, data.x_train, out, start, resume)

    stage, second_stage = recipe.second, model.second_stage.requires_grad_(True)
    state = start_muon(second_stage, stage.lr, recipe.seed, stage.ema_decay)
    spent += SAVING_SECONDS
    if budget.seconds and spent >= budget.seconds:
        raise ValueError(
            f"{budget.seconds / 60:g} minutes are too few: {spent / 60:.1f} went by before the second stage. "
            "Start again in another folder with more."
        )
    rest = Budget(steps=budget.steps - first.step) if budget.steps else Budget(seconds=budget.seconds - spent)
    loss_fn = second_stage_loss_fn(model, latents, captions, stage.batch_size, recipe.logit_normal)
    run_stage("2 diffusion  ", state, loss_fn, rest, stage.lr, out / "second_stage.safetensors", resume)
    second_stage.load_state_dict(state.ema.model.state_dict())
    model.save_pretrained(out)
    return {"steps": [first.step, state.step], "seconds": [round(first.elapsed), round(state.elapsed)]}


def train_first_stage(
    recipe: TextRecipe, autoencoder: Autoencoder, images: torch.Tensor, out: Path, budget: Budget, resume: bool
) -> TrainState:
    """Train the autoencoder on uint8 images (N, C, H, W); the result is the state's EMA."""
    stage = recipe.first
    autoencoder.requires_grad_(True)
    state = start_muon(autoencoder, stage.lr, recipe.seed, stage.ema_decay)
    loss_fn = first_stage_loss_fn(images, stage.batch_size, recipe.kl_weight)
    run_stage("1 autoencoder", state, loss_fn, budget, stage.lr, out / "first_stage.safetensors", resume)
    autoencoder.requires_grad_(False)
    return state


def cached_latents(
    model: LatentDiffusion, images: torch.Tensor, out: Path, start: float, resume: bool
) -> tuple[torch.Tensor, float]:
    """Scaled latents (N, C, h, w) of uint8 images, encoded once, and the seconds spent since `start` by then.

    Writes them to `latents.safetensors`; a run to `resume` reads them from there. Sets their mean and deviation.
    """
    path = out / "latents.safetensors"
    if not (resume and path.exists()):
        raw = encode_all(model.autoencoder, images)
        spent = {"spent": str(time.monotonic() - start)}
        write_atomically(path, lambda file: save_file({"raw": raw.contiguous()}, file, spent))
    tensors, metadata = read_safetensors(path)
    model.autoencoder.set_latent_statistics(tensors["raw"])
    return model.autoencoder.standardise(tensors["raw"]), float(metadata["spent"])


def metrics_in_card(folder: Path) -> dict:
    """{"metrics": …} as `evaluate` put it into the card.json of a folder, or nothing."""
    try:
        return {"metrics": json.loads((folder / "card.json").read_text())["metrics"]}
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def write_card(out: Path, name: str, recipe: Recipe, budget: Budget, made: dict, metrics: dict) -> None:
    """card.json: which recipe, seed, data, steps, seconds and machine made the weights, the command, and metrics."""
    amount = f"--steps {budget.steps}" if budget.steps else f"--minutes {budget.seconds / 60:g}"
    card = {
        "recipe": name,
        "command": f"python -m minildm train {name} {amount}",
        "seed": recipe.seed,
        "data": {"name": "MNIST", "sha256": MNIST_SHA256["train-images-idx3-ubyte"]},
        **made,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {pick_device()}",
        "torch": torch.__version__,
        "configuration": asdict(recipe),
        **metrics,
    }
    write_atomically(out / "card.json", lambda file: file.write_text(json.dumps(card, indent=1)))


def add_to_card(folder: Path, metrics: dict) -> None:
    """Put the metrics of `evaluate` into the card.json of a folder, where there is one."""
    path = folder / "card.json"
    if path.exists():
        try:
            card = json.loads(path.read_text()) | {"metrics": metrics}
        except (TypeError, ValueError):
            raise DataError(f"{path} is damaged: restore it, or delete it and evaluate again.") from None
        write_atomically(path, lambda file: file.write_text(json.dumps(card, indent=1)))


def load_judge(name: Path | str | None = None) -> DigitClassifier:
    """The shipped digit classifier, or one from a folder, ready to judge. Raises DataError like `from_pretrained`."""
    name = name or weights_root() / "mnist-classifier"  # not a folder of that name where the command is run
    return load_model(name, lambda config: DigitClassifier(), "a digit classifier")


def load_features(name: Path | str | None = None) -> FeatureNet:
    """The shipped network of the perceptual distance, or one from a folder. Raises DataError like `from_pretrained`."""
    name = name or weights_root() / "mnist-features"
    return load_model(name, lambda config: FeatureNet(), "a network of features")


def load_autoencoder(name: Path | str) -> AutoencoderKL | AutoencoderVQ:
    """A first stage by its shipped name, such as "mnist-kl-f4", or by the folder of its run.

    Raises DataError when there is none or one of its files is missing, damaged, altered or of another kind.
    """

    def build(config: dict) -> AutoencoderKL | AutoencoderVQ:
        return make_autoencoder(config_from_dict(AutoencoderConfig, config))

    return load_model(name, build, "a first stage")


def is_first_stage(name: Path | str) -> bool:
    """Whether a model is a first stage alone. Raises DataError when there is no such model."""
    return "multipliers" in read_model(name)[0]


@torch.no_grad()
def evaluate_first_stage(
    autoencoder: AutoencoderKL | AutoencoderVQ, judge: DigitClassifier, net: FeatureNet, n: int = 10_000
) -> dict[str, float]:
    """Figures of a first stage on the first n test images, each reconstructed from its latent without sampling.

    psnr in decibels, ssim, perceptual (distance by `net`): means over the images. rfid: Fréchet distance in the judge's
    features between reconstructions and originals. KL: nats_per_latent, the KL a latent value. VQ: bits_per_latent,
    log2 of the codes a latent vector over its channels; code_use, the share of codes used; their perplexity.
    Raises ValueError when n is not between 2 and 10,000.
    """
    if not 2 <= n <= 10_000:
        raise ValueError(f"evaluate on 2 to 10,000 samples, not {n}.")
    device = next(autoencoder.parameters()).device
    x = to_float(load_mnist().x_test[:n])
    parts = [_reconstruct(autoencoder, batch.to(device)) for batch in x.split(100)]
    x_hat, rates = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    pairs = list(zip(x_hat.split(500), x.split(500), strict=True))
    perceptual = [perceptual_distance(net, a.to(device), b.to(device)).cpu() for a, b in pairs]
    (_, features), (_, real) = predict(judge, x_hat), predict(judge, x)
    return {
        "samples": n,
        "psnr": psnr(x_hat, x).mean().item(),
        "ssim": ssim(x_hat, x).mean().item(),
        "perceptual": torch.cat(perceptual).mean().item(),
        "rfid": frechet_distance(features, real),
        **_rate_figures(autoencoder.config, rates),
    }


def _reconstruct(autoencoder: Autoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ (B, C, H, W) in [-1, 1], and what the latents cost: nats an image (B,) or codes (B, h, w); on the CPU."""
    if isinstance(autoencoder, AutoencoderVQ):
        z = autoencoder.encode(x)
        rate = autoencoder.quantiser(z).indices
    else:
        posterior = autoencoder.encode(x)
        z, rate = posterior.mean, posterior.kl()
    return autoencoder.decode(z).clamp(-1, 1).cpu(), rate.cpu()


def _rate_figures(config: AutoencoderConfig, rates: torch.Tensor) -> dict[str, float]:
    """The figures of a rate: `nats_per_latent`, or `bits_per_latent`, `code_use` and `perplexity`."""
    values = config.latent_channels * (32 // config.factor) ** 2
    if not config.codes:
        return {"nats_per_latent": rates.mean().item() / values}
    return {
        "bits_per_latent": math.log2(config.codes) / config.latent_channels,
        "code_use": len(rates.unique()) / config.codes,
        "perplexity": perplexity(rates, config.codes).item(),
    }


def evaluate(model: LatentDiffusion, judge: DigitClassifier, n: int = 10_000, **sampling) -> dict[str, float]:
    """Figures of a text-to-image model on MNIST, from one image for each of the first n captions of the test set.

    Those of `metrics.measure` against the first n test images, real_frechet_distance_N between the first n training
    and test images, and psnr, of the test images through the autoencoder, in decibels.
    `sampling` goes to `LatentDiffusion.sample`. Raises ValueError when n is not between 20 and 10,000.
    """
    if not 20 <= n <= 10_000:
        raise ValueError(f"evaluate on 20 to 10,000 samples, not {n}.")
    data = load_mnist()
    words = StrokeWords.measure(data.x_train, data.y_train)
    real, labels = data.x_test[:n], data.y_test[:n]
    images = sample_many(model, words.captions(real, labels), **sampling)
    reference = Reference.of(real, data.x_train, words, judge)
    _, train_features = predict(judge, to_float(data.x_train[:n]))
    x = to_float(real)
    with torch.no_grad():
        x_hat = torch.cat([model.decode(model.encode(batch)).cpu() for batch in x.split(500)])
    return {
        **measure(images, labels, words.thirds(real, labels), reference),
        f"real_frechet_distance_{n}": frechet_distance(train_features, reference.features),
        "psnr": psnr(x_hat, x).mean().item(),
    }


def sample_many(model: LatentDiffusion, prompts: list[str], batch_size: int = 250, **sampling) -> torch.Tensor:
    """Samples for any number of prompts (N of them), in batches with the seeds 0, 1, …: (N, C, H, W) on the CPU."""
    starts = range(0, len(prompts), batch_size)
    batches = [
        model.sample(prompts[start : start + batch_size], seed=seed, **sampling).cpu()
        for seed, start in enumerate(starts)
    ]
    return torch.cat(batches)
