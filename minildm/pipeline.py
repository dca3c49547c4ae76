# Exported from notebooks/07_latent_diffusion.ipynb by tools/export.py: edit the notebook, not this file.
"""The whole system: autoencoder, prompt encoder, UNet and sampler behind one door."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minildm.autoencoder import Autoencoder, AutoencoderConfig, make_autoencoder
from minildm.conditioning import CAPTION_WORDS, TextEncoder, Tokenizer, guided
from minildm.data import DataError, data_root, drop_words, seeded, sha256, to_float, write_atomically
from minildm.diffusion import diffusion_loss, make_schedule
from minildm.sampling import denoiser, sample, timesteps
from minildm.training import batch_indices, load_weights, read_safetensors
from minildm.unet import UNet, UNetConfig


def config_from_dict(kind: type, values: dict):
    """The dataclass `kind` that `dataclasses.asdict` turned into `values`, by way of JSON: its tuples became lists."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class LDMConfig:
    """Everything that is needed to build a LatentDiffusion, apart from its weights.

    `schedule`, `beta_start`, `beta_end` as in `make_schedule`; `target` is what the UNet predicts; `image_size` is the
    height and width of the images it was trained on.
    """

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(context_dim=64))
    words: tuple[str, ...] = CAPTION_WORDS
    text_depth: int = 2
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    target: str = "eps"
    image_size: int = 32

    def __post_init__(self):
        if self.target not in ("eps", "x0", "v"):
            raise ValueError(f'target must be "eps", "x0" or "v", not "{self.target}".')
        if self.unet.context_dim is None or self.unet.context_dim % 4:
            raise ValueError(f"context_dim must be a multiple of 4, a part for each head, not {self.unet.context_dim}.")
        if self.image_size < 1 or self.image_size % self.autoencoder.factor:
            f = self.autoencoder.factor
            raise ValueError(f"image_size must be a multiple of the compression factor {f}, not {self.image_size}.")

    @classmethod
    def from_dict(cls, values: dict) -> "LDMConfig":
        """The config that `dataclasses.asdict` turned into `values`, by way of JSON."""
        parts = {"autoencoder": AutoencoderConfig, "unet": UNetConfig}
        parts = {name: config_from_dict(kind, values[name]) for name, kind in parts.items()}
        return config_from_dict(cls, values | parts)


def weights_root() -> Path:
    """The folder of the shipped weights."""
    return data_root() / "weights"


def save_model(model: nn.Module, config: dict, folder: Path) -> None:
    """Write a model's weights (model.safetensors), its config and their checksum (config.json) into a folder."""
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda file: save_file(weights, file))
    config = config | {"weights_sha256": sha256(folder / "model.safetensors")}
    write_atomically(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=1)))


def read_model(name: Path | str) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """config.json, the weights, and their path, of a model given by its shipped name or its folder.

    Raises DataError when there is no such model or one of its files is missing, damaged or altered.
    """
    folder = next((f for f in (Path(name), weights_root() / name) if (f / "config.json").exists()), None)
    if folder is None:
        shipped = ", ".join(sorted(path.parent.name for path in weights_root().glob("*/config.json")))
        raise DataError(f'there is no model "{name}": give a folder with a config.json, or one of {shipped or "none"}.')
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} is damaged ({error}): restore it or train again.") from None
    path = folder / "model.safetensors"
    weights, _ = read_safetensors(path)
    if sha256(path) != config.pop("weights_sha256", None):
        raise DataError(f"{path} was altered (wrong checksum): restore it or train again.")
    return config, weights, path


def load_model(name: Path | str, build: Callable[[dict], nn.Module], kind: str) -> nn.Module:
    """The model that `build` makes of its config, by its shipped name or its folder: with its weights, and frozen.

    Raises DataError as `read_model` does, and when the config or the weights are not those of `kind`.
    """
    config, weights, path = read_model(name)
    try:
        model = build(config)
    except Exception as error:  # whatever an altered or foreign file makes of the constructors
        raise DataError(
            f"{path.with_name('config.json')} does not describe {kind} ({error!r}): restore it or give another model."
        ) from None
    load_weights(model, weights, path)
    return model.requires_grad_(False).eval()


class SecondStage(nn.Module):
    """What the second stage trains: τ_θ and the UNet together. x (B, C, h, w), t (B,), tokens (B, M) → (B, C, h, w)."""

    def __init__(self, config: LDMConfig):
        super().__init__()
        width = config.unet.context_dim
        self.text_encoder = TextEncoder(len(Tokenizer(config.words)), width, config.text_depth)
        self.unet = UNet(config.unet)

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens[:, : (tokens != 0).any(0).sum()]  # columns of padding alone are masked, and would cost time
        context, mask = self.text_encoder(tokens)
        return self.unet(x, t, context, mask)


class LatentDiffusion(nn.Module):
    """A text-to-image latent diffusion model: `sample` is its purpose, `from_pretrained` its usual origin."""

    def __init__(self, config: LDMConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.words)
        self.autoencoder = make_autoencoder(config.autoencoder)
        self.second_stage = SecondStage(config)
        self.schedule = make_schedule(config.schedule, beta_start=config.beta_start, beta_end=config.beta_end)
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()  # the order for convolutions, lesson 04

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(latent_channels, h, w) of one image's latents."""
        side = self.config.image_size // self.config.autoencoder.factor
        return self.config.autoencoder.latent_channels, side, side

    @torch.no_grad()
    def conditioning(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts (B of them) → the UNet's keyword arguments: context (B, M, dim) and mask (B, M)."""
        context, mask = self.second_stage.text_encoder(self.tokenizer.encode(prompts).to(self.device))
        return {"context": context, "mask": mask}

    def denoiser(
        self,
        prompts: list[str],
        guidance_scale: float,
        guidance_interval: tuple[float, float] = (0, math.inf),
        guidance_rescale: float = 0.0,
    ) -> Callable:
        """denoise(x, t) → (x0, eps) for latents x (B, C, h, w), steered by one prompt each."""
        conditional, unconditional = self.conditioning(prompts), self.conditioning([""] * len(prompts))
        guidance = guidance_scale, guidance_interval, guidance_rescale
        model = guided(self.second_stage.unet, conditional, unconditional, *guidance)
        return denoiser(model, self.schedule, self.config.target)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        steps: int = 20,
        guidance_scale: float = 2.0,
        seed: int = 0,
        sampler: str = "ddim",
        eta: float = 0.0,
        init: torch.Tensor | None = None,
        strength: float = 0.6,
        guidance_interval: tuple[float, float] = (0, math.inf),
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        """One image for each prompt: (B, in_channels, H, W) in [-1, 1].

        With `guidance_interval` = (low, high) only the steps low ≤ t < high are guided; `guidance_rescale` from 0 to 1
        gives guided predictions back the deviation that guidance has changed (lesson 05).
        `sampler` is "ddim" (with `eta`), "ddpm" or "dpm++". With `init`, images (1 or B, in_channels, H, W) in [-1, 1],
        sampling starts not from noise but from their latents, noised up to the share `strength` in (0, 1] of the steps.
        Raises PromptError for a bad prompt and ValueError for any other argument out of range.
        """
        order = timesteps(self.schedule, steps)
        denoise = self.denoiser(prompts, guidance_scale, guidance_interval, guidance_rescale)
        generator = seeded(seed)
        x = torch.randn(len(prompts), *self.latent_shape, generator=generator).to(next(self.parameters()))
        if init is not None:
            if not 0 < strength <= 1:
                raise ValueError(f"strength must be above 0 and at most 1, not {strength}.")
            if len(init) not in (1, len(prompts)):
                raise ValueError(f"init must be one image, or {len(prompts)}, one for each prompt, not {len(init)}.")
            walked = max(1, math.ceil(strength * steps - 1e-9))  # 0.28 · 25 is a little above 7 for a computer
            order = order[-walked:]
            x = self.schedule.add_noise(self.encode(init).expand_as(x), order[0], x)
        for z in sample(denoise, self.schedule, x, order, generator, sampler, eta):
            x = z
        return self.decode(x)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] → scaled latents (B, latent_channels, h, w).

        Raises ValueError for another shape or range.
        """
        size = self.config.image_size
        shape = (self.config.autoencoder.in_channels, size, size)
        if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"images must be (B, {shape[0]}, {size}, {size}), not {tuple(images.shape)}.")
        if not images.is_floating_point() or not images.abs().max() <= 1.001:  # `not <=` also catches NaN
            raise ValueError("images must be float in [-1, 1]: turn uint8 images into them with minildm.data.to_float.")
        return self.autoencoder.to_latents(images.to(next(self.parameters()))).contiguous()

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, latent_channels, h, w) → images (B, in_channels, H, W), clipped to [-1, 1]."""
        return self.autoencoder.from_latents(z).clamp(-1, 1).contiguous()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model into a folder, as `save_model` does."""
        save_model(self, asdict(replace(self.config, autoencoder=self.autoencoder.config)), Path(folder))

    @classmethod
    def from_pretrained(cls, name: Path | str) -> "LatentDiffusion":
        """A model by its shipped name, such as "mnist-text", or by the folder that save_pretrained wrote.

        Raises DataError when there is no such model or one of its files is missing, damaged or altered.
        """
        return load_model(name, lambda config: cls(LDMConfig.from_dict(config)), "a text-to-image model")


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Raw latents of uint8 images (N, C, H, W), before any sampling or quantising, (N, latent_channels, H/f, W/f)."""
    device = next(autoencoder.parameters()).device
    return torch.cat([autoencoder.latent(to_float(batch).to(device)).cpu() for batch in images.split(250)]).contiguous()


def second_stage_loss_fn(
    model: LatentDiffusion,
    latents: torch.Tensor,
    captions: list[str],
    batch_size: int,
    logit_normal: tuple[float, float] | None = None,
) -> Callable[[SecondStage, torch.Generator], torch.Tensor]:
    """The second stage's loss_fn for `train`, on cached standardised latents (N, C, h, w) and their captions.

    `logit_normal` says from which steps to learn most, as in `diffusion_loss`.
    """

    def loss_fn(second_stage: SecondStage, generator: torch.Generator) -> torch.Tensor:
        device = next(second_stage.parameters()).device
        index = batch_indices(len(latents), batch_size, generator)
        prompts = drop_words([captions[i] for i in index.tolist()], generator)
        tokens = model.tokenizer.encode(prompts).to(device)
        z, target = latents[index].to(device), model.config.target
        return diffusion_loss(second_stage, model.schedule, z, generator, target, logit_normal, tokens=tokens)

    return loss_fn
