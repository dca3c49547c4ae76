"""One line of the speed-run's log: mnist-text with one thing changed, over three seeds.

    python tools/speedrun.py NAME [NAME …] [--seconds 120 | --steps N] [--seeds 0 1 2] [--samples 1000]

Trains the second stage for so many seconds, or steps where the change makes none dearer, on the latents of the shipped
autoencoder, so that only the change differs; a name that starts with "share" trains both stages, in the same seconds
together. Prints a row for each seed: steps, held-out v-loss (the first 2,000 test images at 50 fixed steps), share read
as asked and Fréchet distance in the judge's features of samples without guidance. Losses on latents of different
autoencoders cannot be compared. The verdicts are kept in data/results/speedrun.md.
"""

import argparse
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from minildm import recipes
from minildm.data import ImageData, StrokeWords, drop_words, load_mnist, seeded, to_float
from minildm.judge import frechet_distance, predict
from minildm.losses import first_stage_loss_fn
from minildm.muon import start_muon
from minildm.pipeline import LatentDiffusion, encode_all
from minildm.training import Budget, TrainState, batch_indices, train

# What each name changes: fields of the recipe's second stage, of its UNet, of its config, and of the loss.
CHANGES = {
    "base": {},
    "AdamW at 2.5e-3": {"optimiser": TrainState.start, "stage": {"lr": 2.5e-3}},
    "batch 64": {"stage": {"batch_size": 64}},
    "batch 256": {"stage": {"batch_size": 256}},
    "EMA 0.999": {"stage": {"ema_decay": 0.999}},
    "no EMA": {"averaged": False},
    "rate 5e-3": {"stage": {"lr": 5e-3}},
    "rate 2e-2": {"stage": {"lr": 2e-2}},
    "one text layer": {"config": {"text_depth": 1}},
    "32 channels": {"unet": {"channels": 32}},
    "64 channels": {"unet": {"channels": 64}},
    "one level": {"unet": {"multipliers": (1,), "attention": (True,)}},
    "transformers at 2x2, too": {"unet": {"attention": (True, True)}},
    "twice as wide at 2x2": {"unet": {"multipliers": (1, 2)}},
    "min-SNR 5": {"loss": {"min_snr": 5.0}},
    "time added": {"unet": {"scale_shift": False}},
    "no token in the time": {"unet": {"pooled": False}},
    "all captions thinned": {"loss": {"drop": {"p_thin": 1.0, "p_word": 0.1, "p_all": 0.1}}},
    "even steps": {"loss": {"logit_normal": None}},
    "more steps of much noise": {"loss": {"logit_normal": (0.3, 0.8)}},
    "more steps of little noise": {"loss": {"logit_normal": (-1.1, 0.8)}},
    "steps drawn alone": {"loss": {"alone": True}},
    "linear schedule": {"config": {"schedule": "linear"}},
    "eps target": {"config": {"target": "eps"}},
    "channels-first": {"layout": torch.contiguous_format},
    "compiled": {"compiled": True},
    "share 0.15": {"share": 0.15},
    "share 0.25": {"share": 0.25},
    "share 0.4": {"share": 0.4},
}


def steps_of(
    n: int, total: int, generator: torch.Generator, logit_normal: tuple[float, float] | None, alone: bool = False
) -> torch.Tensor:
    """Steps for n samples (n,) as `diffusion_loss` draws them; or each `alone`, not one from each of n parts."""
    places = torch.rand(n, generator=generator)
    places = places if alone else (torch.arange(n) + places) / n
    if logit_normal is not None:
        places = torch.sigmoid(logit_normal[0] + logit_normal[1] * torch.special.ndtri(places))
    return (places * total).long().clamp(max=total - 1)


def loss_function(model: LatentDiffusion, latents: torch.Tensor, captions: list[str], batch_size: int, **loss):
    """The recipe's loss with other steps, other words, or weighted by min(SNR, γ)/(SNR+1) (Hang et al., 2023)."""
    min_snr, drop, kind = loss.pop("min_snr", None), loss.pop("drop", {}), model.config.target

    def loss_fn(second_stage, generator):
        index = batch_indices(len(latents), batch_size, generator)
        tokens = model.tokenizer.encode(drop_words([captions[i] for i in index.tolist()], generator, **drop))
        z, t = latents[index], steps_of(batch_size, len(model.schedule), generator, **loss)
        eps = torch.randn(z.shape, generator=generator)
        prediction = second_stage(model.schedule.add_noise(z, t, eps), t, tokens=tokens)
        error = (prediction - model.schedule.target(kind, z, t, eps)).square().mean((1, 2, 3))
        if min_snr is not None:
            snr = model.schedule.alpha_bar[t] / (1 - model.schedule.alpha_bar[t])
            error = error * (snr.clamp(max=min_snr) / (snr + 1)).to(error)
        return error.mean()

    return loss_fn


@torch.no_grad()
def held_out_loss(model: LatentDiffusion, latents: torch.Tensor, captions: list[str]) -> float:
    """The v-loss on latents (N, C, h, w) at 50 steps spread over the schedule, with fixed noise."""
    generator, schedule, t, losses = seeded(1), model.schedule, torch.arange(10, len(model.schedule), 20), []
    for i in range(0, len(latents), len(t)):
        z = latents[i : i + len(t)]
        eps = torch.randn(z.shape, generator=generator)
        xt, tokens = schedule.add_noise(z, t, eps), model.tokenizer.encode(captions[i : i + len(t)])
        prediction = model.second_stage(xt, t, tokens=tokens)
        x0, noise = schedule.x0_and_eps(model.config.target, prediction, xt, t)
        losses.append(F.mse_loss(schedule.target("v", x0, t, noise), schedule.target("v", z, t, eps)))
    return torch.stack(losses).mean().item()


def first_stage(model: LatentDiffusion, images: torch.Tensor, recipe: recipes.TextRecipe, seed: int, budget: Budget):
    """Train the autoencoder of the model as the recipe does, on uint8 images (N, C, H, W)."""
    stage, autoencoder = recipe.first, model.autoencoder.requires_grad_(True)
    state = start_muon(autoencoder, stage.lr, seed, stage.ema_decay)
    for _ in train(state, first_stage_loss_fn(images, stage.batch_size, recipe.kl_weight), budget, stage.lr):
        pass
    autoencoder.load_state_dict(state.ema.model.state_dict())
    autoencoder.requires_grad_(False).eval().set_latent_statistics(encode_all(autoencoder, images))


def make_model(change: dict, recipe: recipes.TextRecipe, data: ImageData, seed: int, budget: Budget) -> LatentDiffusion:
    """A model with a new second stage, on the shipped autoencoder or on one trained for its share of the seconds."""
    shipped = LatentDiffusion.from_pretrained("mnist-text").autoencoder
    config = replace(
        recipe.config, unet=replace(recipe.config.unet, **change.get("unet", {})), **change.get("config", {})
    )
    own = "share" in change
    torch.manual_seed(seed)
    model = LatentDiffusion(config if own else replace(config, autoencoder=shipped.config))
    model.to(memory_format=change.get("layout", torch.channels_last))
    if own:
        first_stage(model, data.x_train, recipe, seed, budget.share(change["share"]))
    else:
        model.autoencoder.load_state_dict(shipped.state_dict())
    return model


def measure(name: str, seed: int, budget: Budget, samples: int) -> str:
    """Train with one change and one seed; a row of the log."""
    change, recipe, data, judge = CHANGES[name], recipes.find_recipe("mnist-text"), load_mnist(), recipes.load_judge()
    words = StrokeWords.measure(data.x_train, data.y_train)
    captions, prompts = (words.captions(x, y) for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)))
    start = time.monotonic()
    model = make_model(change, recipe, data, seed, budget)
    latents, held_out = (
        model.autoencoder.standardise(encode_all(model.autoencoder, x)) for x in (data.x_train, data.x_test[:2000])
    )
    if "share" in change:
        budget = Budget(seconds=budget.seconds - (time.monotonic() - start))
    stage = replace(recipe.second, **change.get("stage", {}))
    second_stage = model.second_stage.requires_grad_(True)
    state = change.get("optimiser", start_muon)(second_stage, stage.lr, seed, ema_decay=stage.ema_decay)
    loss = {"logit_normal": recipe.logit_normal} | change.get("loss", {})
    loss_fn = loss_function(model, latents, captions, stage.batch_size, **loss)
    faster = torch.compile(second_stage) if change.get("compiled") else second_stage  # the same weights
    for _ in train(state, lambda _, generator: loss_fn(faster, generator), budget, stage.lr):
        pass
    if change.get("averaged", True):
        second_stage.load_state_dict(state.ema.model.state_dict())
    second_stage.requires_grad_(False).eval()
    images = recipes.sample_many(model, prompts[:samples], guidance_scale=1.0, sampler="dpm++")
    read, features = predict(judge, images)
    _, real = predict(judge, to_float(data.x_test[:samples]))
    accuracy = (read == data.y_test[:samples]).float().mean().item()
    return (
        f"| {name} | {seed} | {state.step} | {held_out_loss(model, held_out, prompts):.4f} "
        f"| {accuracy:.1%} | {frechet_distance(features, real):.2f} |"
    )


def main() -> None:
    """Print a table of the chosen changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(CHANGES), metavar="NAME", help=", ".join(CHANGES))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps", type=int, help="in place of seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    budget = Budget(steps=args.steps) if args.steps else Budget(seconds=args.seconds)
    if args.steps and any("share" in CHANGES[name] for name in args.names):
        parser.error("a share is one of seconds: leave out --steps.")
    length = f"{args.steps} steps" if args.steps else f"{args.seconds:g} s"
    print(f"{length} each, {torch.get_num_threads()} threads, {args.samples} samples")
    print("| change | seed | steps | held-out v-loss | read as asked | Fréchet distance |\n|---|---|---|---|---|---|")
    for seed in args.seeds:
        for name in args.names:
            print(measure(name, seed, budget, args.samples), flush=True)


if __name__ == "__main__":
    main()
