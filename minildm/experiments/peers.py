"""minildm against diffusers: the same models with the same weights, timed in turns on the same machine."""

import os
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minildm.autoencoder import AutoencoderConfig, AutoencoderKL
from minildm.bench import stopwatch
from minildm.conditioning import guided
from minildm.data import import_torchvision, pick_device, seeded
from minildm.experiments.common import kept
from minildm.interop import (
    autoencoder_config_to_diffusers,
    diffusers_names,
    scheduler_to_diffusers,
    unet_config_to_diffusers,
)
from minildm.pipeline import LatentDiffusion, LDMConfig
from minildm.recipes import RECIPES
from minildm.sampling import denoiser, sample, timesteps
from minildm.unet import UNet, UNetConfig

REPEATS, STEPS, GUIDANCE_SCALE, KL_WEIGHT, LR = 21, 20, 2.0, 1e-2, 1e-4
PROMPT = "a thick slanted seven"


@dataclass
class Setting:
    """A model of ours and what it works on: `context` and `mask` are those of the prompts, then of empty ones."""

    model: LatentDiffusion
    images: torch.Tensor  # (b, C, H, W)
    latents: torch.Tensor  # (B, c, h, w)
    context: torch.Tensor  # (2B, M, dim)
    mask: torch.Tensor  # (2B, M)


def mnist_text() -> Setting:
    """The shipped model with the batches it was trained on."""
    model, recipe = LatentDiffusion.from_pretrained("mnist-text"), RECIPES["mnist-text"]
    batch, size = recipe.second.batch_size, model.config.image_size
    images = torch.rand(recipe.first.batch_size, 1, size, size, generator=seeded(0)) * 2 - 1
    latents = torch.randn(batch, *model.latent_shape, generator=seeded(1))
    return Setting(model, images, latents, **model.conditioning([PROMPT] * batch + [""] * batch))


MID_SIZE = LDMConfig(
    AutoencoderConfig(3, 4, 32, (1, 2, 4), attention=True, groups=32),
    UNetConfig(4, 4, 64, (1, 2), attention=(True, True), context_dim=256),
    image_size=128,
)


def mid_size(config: LDMConfig = MID_SIZE, batch: int = 1) -> Setting:
    """Random weights, latents of 32×32 and 77 tokens: so large that the time is not only overhead."""
    torch.manual_seed(0)
    model = LatentDiffusion(config)
    for parameter in model.parameters():
        if not parameter.any():  # a layer of zeros would hide what lies before it
            parameter.normal_(std=0.1)
    images = torch.rand(batch, 3, config.image_size, config.image_size, generator=seeded(0)) * 2 - 1
    latents = torch.randn(batch, *model.latent_shape, generator=seeded(1))
    context = torch.randn(2 * batch, 77, config.unet.context_dim, generator=seeded(2))
    mask = torch.arange(77) < torch.tensor([12, 2]).repeat_interleave(batch)[:, None]  # a prompt, and an empty one
    return Setting(model, images, latents, context, mask)


SETTINGS = {"mnist-text": mnist_text, "mid-size": mid_size}


def peers(work: Path) -> dict:
    """minildm against diffusers with the same weights: time and memory, the content of peers.json.

    "rows": for each configuration the UNet's and the autoencoder's forward pass and training step (loss, gradients,
    AdamW), and 20 DDIM steps with guidance from noise to latents. `ours_ms` and `diffusers_ms` are medians over
    REPEATS runs in turns; `ratio` is the median of the ratios of neighbouring runs (below 1: minildm is faster),
    `ratio_low` and `ratio_high` are their quartiles; `ours_mb` and `diffusers_mb` the most that tensors occupy at once
    beyond weights and inputs. Outputs are compared first. Both work in channels_last; diffusers' feed-forward layers
    are narrowed to the width that ours have. Every configuration that is done is kept in the folder `work`.
    Raises ValueError without diffusers, and when the two disagree.
    """
    import_diffusers()
    parts = [kept(work / f"{name}.json", lambda name=name: {"rows": measure(name)}) for name in SETTINGS]
    return {"rows": [row for part in parts for row in part["rows"]]}


def import_diffusers():
    """The package diffusers. Raises ValueError when it is not installed."""
    import_torchvision()  # first, with its repair
    try:
        import diffusers
    except ImportError:
        raise ValueError('diffusers is not installed: add the test extra with `pip install -e ".[test]"`.') from None
    return diffusers


def measure(name: str) -> list[dict]:
    """The rows of one configuration."""
    setting, device = SETTINGS[name](), pick_device()
    setting.model.to(device, memory_format=torch.channels_last)
    unet, autoencoder = setting.model.second_stage.unet, setting.model.autoencoder
    ours = works(unet, autoencoder, setting)
    theirs = works(diffusers_twin(unet), diffusers_twin(autoencoder), setting)
    rows = []
    for (part, what), run in ours.items():
        figures = compare(run, theirs[part, what], REPEATS)
        print(f"{name:12} {part:12} {what:14} {figures}", flush=True)
        rows.append({"part": part, "configuration": name, "what": what, **figures})
    return rows


def diffusers_twin(model: UNet | AutoencoderKL) -> nn.Module:
    """diffusers' model of the same configuration, feed-forward width included, with the same weights."""
    from diffusers.models.attention import BasicTransformerBlock, FeedForward

    diffusers, config = import_diffusers(), model.config
    if isinstance(model, UNet):
        values = unet_config_to_diffusers(replace(config, ff_multiplier=4))  # the only width that diffusers builds
        twin = diffusers.UNet2DConditionModel.from_config(values)
        for block in twin.modules():
            if isinstance(block, BasicTransformerBlock):
                block.ff = FeedForward(block.dim, mult=config.ff_multiplier, activation_fn="geglu")
    else:
        twin = diffusers.AutoencoderKL.from_config(autoencoder_config_to_diffusers(config))
    names = diffusers_names(model)
    twin.load_state_dict({names[key]: weight for key, weight in model.state_dict().items()})
    return twin.to(pick_device(), memory_format=torch.channels_last).requires_grad_(False).eval()


def works(unet: nn.Module, autoencoder: nn.Module, setting: Setting) -> dict[tuple[str, str], Callable]:
    """What is timed, by part and name: functions without arguments, for the models of either library."""
    device = next(unet.parameters()).device
    x, z, context, mask = (
        value.to(device) for value in (setting.images, setting.latents, setting.context, setting.mask)
    )
    t = torch.arange(len(z), device=device) * 999 // len(z)
    inputs, frozen = (z, t, context[: len(z)], mask[: len(z)]), torch.no_grad()
    return {
        ("unet", "forward"): frozen(lambda: predict(unet, *inputs)),
        ("unet", "training step"): training_step(unet, lambda model: F.mse_loss(predict(model, *inputs), z)),
        ("autoencoder", "forward"): frozen(lambda: reconstruct(autoencoder, x)[0]),
        ("autoencoder", "training step"): training_step(autoencoder, lambda model: autoencoder_loss(model, x)),
        ("sampling", f"{STEPS} steps"): frozen(lambda: draw(unet, setting.model, z, context, mask)),
    }


def predict(unet: nn.Module, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, mask: torch.Tensor):
    """The output (B, c, h, w) of either library's UNet."""
    if isinstance(unet, UNet):
        return unet(x, t, context, mask)
    first = context[:, 0] if unet.config.class_embed_type else None  # `pooled`
    return unet(x, t, context, class_labels=first, encoder_attention_mask=mask, return_dict=False)[0]


def reconstruct(autoencoder: nn.Module, x: torch.Tensor, generator: torch.Generator | None = None):
    """x̂ (B, C, H, W) of either library's autoencoder and the posterior, from its mean or from a draw.

    diffusers' knows no patches: where ours has them, it gets folded images, and what it gives is unfolded.
    """
    is_ours = isinstance(autoencoder, AutoencoderKL)
    patch = 1 if is_ours else autoencoder.config.get("patch", 1)
    x = F.pixel_unshuffle(x, patch) if patch > 1 else x  # (B, C·p², H/p, W/p)
    posterior = autoencoder.encode(x) if is_ours else autoencoder.encode(x, return_dict=False)[0]
    z = posterior.mean if generator is None else posterior.sample(generator)
    x_hat = autoencoder.decode(z) if is_ours else autoencoder.decode(z, return_dict=False)[0]
    return F.pixel_shuffle(x_hat, patch) if patch > 1 else x_hat, posterior


def autoencoder_loss(autoencoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Squared error and KL of a draw that is always the same."""
    x_hat, posterior = reconstruct(autoencoder, x, seeded(0))
    return F.mse_loss(x_hat, x) + KL_WEIGHT * posterior.kl().mean()


def training_step(model: nn.Module, loss_fn: Callable[[nn.Module], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that makes a step of AdamW on a copy of the model and returns the loss before it."""
    model = deepcopy(model).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), LR, fused=True)

    def step() -> torch.Tensor:
        loss = loss_fn(model)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def draw(unet: nn.Module, model: LatentDiffusion, noise: torch.Tensor, context: torch.Tensor, mask: torch.Tensor):
    """Latents (B, c, h, w) from noise by DDIM with guidance, each library with its own sampler and loop."""
    if isinstance(unet, UNet):
        halves = zip(context.chunk(2), mask.chunk(2), strict=True)
        prompts, empty = ({"context": tokens, "mask": where} for tokens, where in halves)
        denoise = denoiser(guided(unet, prompts, empty, GUIDANCE_SCALE), model.schedule, model.config.target)
        for z in sample(denoise, model.schedule, noise, timesteps(model.schedule, STEPS), seeded(0)):  # noqa: B007
            pass
        return z
    scheduler, z = import_diffusers().DDIMScheduler.from_config(scheduler_to_diffusers(model.config)), noise
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        cond, uncond = predict(unet, torch.cat([z, z]), t, context, mask).chunk(2)
        z = scheduler.step(uncond + GUIDANCE_SCALE * (cond - uncond), t, z, return_dict=False)[0]
    return z


def compare(ours: Callable, theirs: Callable, repeats: int) -> dict[str, float]:
    """Times and memory of two functions that must return the same tensor; the first call of each is the warm-up."""
    expected, found = theirs(), ours()
    if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise ValueError(f"minildm and diffusers disagree by up to {(found - expected).abs().max():.2g}: mend that.")
    seconds = [(stopwatch(ours), stopwatch(theirs)) for _ in range(repeats)]
    ours_seconds, their_seconds = (statistics.median(column) for column in zip(*seconds, strict=True))
    low, ratio, high = statistics.quantiles([a / b for a, b in seconds])
    return {
        "ours_ms": round(1000 * ours_seconds, 2),
        "diffusers_ms": round(1000 * their_seconds, 2),
        "ratio": round(ratio, 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
        "ours_mb": round(peak_megabytes(ours), 2),
        "diffusers_mb": round(peak_megabytes(theirs), 2),
    }


def peak_megabytes(run: Callable) -> float:
    """The most memory that the tensors made during `run()` hold at once, in 10^6 bytes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6
