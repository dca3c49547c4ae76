"""Weights to and from diffusers and CompVis: the name of every key on each side, and folders that diffusers loads."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minildm.autoencoder import AutoencoderConfig, AutoencoderKL, AutoencoderVQ, make_autoencoder
from minildm.data import DataError, write_atomically
from minildm.pipeline import LatentDiffusion, LDMConfig
from minildm.training import load_weights, read_safetensors
from minildm.unet import UNet, UNetConfig

# Stable Diffusion 1.x: 859,520,964 and 83,653,863 parameters.
SD1_UNET = UNetConfig(4, 4, 320, (1, 2, 4, 4), 2, (True, True, True, False), heads=8, context_dim=768)
SD1_AUTOENCODER = AutoencoderConfig(
    3, 4, 128, (1, 2, 4, 4), 2, attention=True, groups=32, latent_shift=(0.0,) * 4, latent_scale=(0.18215,) * 4
)

# The name maps. Left a part of a key here, right the same part there; "#" is a number, which the right side takes up
# in order. The rules are applied to a key from top to bottom.

Part = UNet | AutoencoderKL | AutoencoderVQ
Config = UNetConfig | AutoencoderConfig
Rules = dict[str, str | Callable[..., str]]

TRANSFORMER: Rules = {  # the same in diffusers and CompVis
    "blocks.#": "transformer_blocks.{}",
    "self_attention": "attn1",
    "cross_attention": "attn2",
    "feed_forward.to_gate": "ff.net.0.proj",
    "feed_forward.to_out": "ff.net.2",
    "to_out": "to_out.0",
}


QUANTISER: Rules = {  # of both autoencoders, the same in diffusers and CompVis
    "to_moments": "quant_conv",
    "to_codes": "quant_conv",
    "quantiser.codebook": "quantize.embedding.weight",
    "from_z": "post_quant_conv",
}


def unet_to_diffusers(config: UNetConfig) -> Rules:
    """The names of UNet2DConditionModel, by those of UNet."""
    return TRANSFORMER | {
        "down.#.#.res": "down_blocks.{}.resnets.{}",
        "down.#.#.transformer": "down_blocks.{}.attentions.{}",
        "downsample.#": "down_blocks.{}.downsamplers.0.conv",
        "middle.#.res": "mid_block.resnets.{}",
        "middle.0.transformer": "mid_block.attentions.0",
        "up.#.#.res": "up_blocks.{}.resnets.{}",
        "up.#.#.transformer": "up_blocks.{}.attentions.{}",
        "upsample.#": "up_blocks.{}.upsamplers.0",
        "time": "time_emb_proj",
        "shortcut": "conv_shortcut",
        "pooled": "class_embedding",
        "time_mlp.0": "time_embedding.linear_1",
        "time_mlp.2": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
    }


def unet_to_compvis(config: UNetConfig) -> Rules:
    """The names of CompVis's UNetModel, by those of UNet: one list down and one up, each entry a stage or a resize.

    Raises ValueError for a UNet with `pooled`, which theirs has not.
    """
    if config.pooled:
        raise ValueError("CompVis's UNet takes no token into its time embedding: only one without `pooled` has names.")
    n = config.res_blocks + 1  # entries of a level: down its blocks and a downsampling, up one block more
    return TRANSFORMER | {
        "res.norm1": "res.in_layers.0",
        "res.conv1": "res.in_layers.2",
        "res.time": "res.emb_layers.1",
        "res.norm2": "res.out_layers.0",
        "res.conv2": "res.out_layers.3",
        "res.shortcut": "res.skip_connection",
        "conv_in": "input_blocks.0.0",
        "down.#.#.res": lambda i, j: f"input_blocks.{1 + n * i + j}.0",
        "down.#.#.transformer": lambda i, j: f"input_blocks.{1 + n * i + j}.1",
        "downsample.#": lambda i: f"input_blocks.{n * (i + 1)}.0.op",
        "middle.0.res": "middle_block.0",
        "middle.0.transformer": "middle_block.1",
        "middle.1.res": "middle_block.2",
        "up.#.#.res": lambda i, j: f"output_blocks.{n * i + j}.0",
        "up.#.#.transformer": lambda i, j: f"output_blocks.{n * i + j}.1",
        "upsample.#": lambda i: f"output_blocks.{n * i + n - 1}.{1 + config.attention[-1 - i]}",
        "time_mlp.#": "time_embed.{}",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }


def autoencoder_to_diffusers(config: AutoencoderConfig) -> Rules:
    """The names of diffusers' AutoencoderKL or VQModel, by those of AutoencoderKL or AutoencoderVQ."""
    n = config.res_blocks
    middle = ["resnets.0", "attentions.0", "resnets.1"] if config.attention else ["resnets.0", "resnets.1"]
    return {
        "encoder.levels.#.#": lambda i, j: f"encoder.down_blocks.{i}.{f'resnets.{j}' if j < n else 'downsamplers.0'}",
        "decoder.levels.#.#": lambda i, j: f"decoder.up_blocks.{i}.{f'resnets.{j}' if j <= n else 'upsamplers.0'}",
        "middle.#": lambda k: f"mid_block.{middle[k]}",
        "attentions.0.norm": "attentions.0.group_norm",
        "to_out": "to_out.0",
        "shortcut": "conv_shortcut",
        "norm_out": "conv_norm_out",
        **QUANTISER,
    }


def autoencoder_to_compvis(config: AutoencoderConfig) -> Rules:
    """The names of CompVis's AutoencoderKL or VQModel, by those here; its decoder counts levels from the image up."""
    n, top = config.res_blocks, len(config.multipliers) - 1
    middle = ["block_1", "attn_1", "block_2"] if config.attention else ["block_1", "block_2"]
    return {
        "encoder.levels.#.#": lambda i, j: f"encoder.down.{i}.{f'block.{j}' if j < n else 'downsample'}",
        "decoder.levels.#.#": lambda i, j: f"decoder.up.{top - i}.{f'block.{j}' if j <= n else 'upsample'}",
        "middle.#": lambda k: f"mid.{middle[k]}",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out": "proj_out",
        "shortcut": "nin_shortcut",
        **QUANTISER,
    }


def translate(key: str, rules: Rules) -> str:
    """A key with every rule applied to it that fits a whole part between dots."""
    for part, name in rules.items():
        pattern = "(?<![^.])" + re.escape(part).replace(r"\#", r"(\d+)") + "(?![^.])"
        replace = name if callable(name) else name.format
        key = re.sub(pattern, lambda found, replace=replace: replace(*map(int, found.groups())), key)
    return key


def diffusers_names(model: nn.Module) -> dict[str, str]:
    """The names of a UNet's or an autoencoder's keys in diffusers, {name here: name there}."""
    rules = (unet_to_diffusers if isinstance(model, UNet) else autoencoder_to_diffusers)(model.config)
    return {key: translate(key, rules) for key in _weights(model)}


def compvis_names(model: nn.Module) -> dict[str, str]:
    """The names of a UNet's or an autoencoder's keys in a checkpoint of CompVis, {name here: name there}."""
    rules = (unet_to_compvis if isinstance(model, UNet) else autoencoder_to_compvis)(model.config)
    return {key: _compvis_prefix(model.config) + translate(key, rules) for key in _weights(model)}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that decides the output: the state dict without the statistics that training keeps of the codes' use."""
    return {k: v for k, v in model.state_dict().items() if k not in ("quantiser.counts", "quantiser.sums")}


def _compvis_prefix(config: Config) -> str:
    return "model.diffusion_model." if isinstance(config, UNetConfig) else "first_stage_model."


# Configurations. What diffusers could be told otherwise, but minildm builds in one way only:

UNET_AS_HERE = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "time_embedding_type": "positional",
    "use_linear_projection": False,
}
TIME = ["default", "scale_shift"]  # how diffusers calls what `scale_shift` and `pooled` choose
POOLED = [None, "simple_projection"]
AUTOENCODER_AS_HERE = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
VQ_AS_HERE = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}


def unet_config_to_diffusers(config: UNetConfig, size: int | None = None) -> dict:
    """The config.json of a UNet2DConditionModel; its inputs are `size` × `size` where that is known.

    With `pooled` theirs must be given the context's first token (B, context_dim) as `class_labels`.
    Raises ValueError for a UNet without cross-attention, which diffusers' class cannot be.
    """
    if config.context_dim is None:
        raise ValueError("diffusers has no UNet2DConditionModel without cross-attention: give the UNet a context_dim.")
    widths = [config.channels * m for m in config.multipliers]
    return (
        UNET_AS_HERE
        | {
            "_class_name": "UNet2DConditionModel",
            "sample_size": size,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "block_out_channels": widths,
            "down_block_types": [f"{'CrossAttn' * attention}DownBlock2D" for attention in config.attention],
            "up_block_types": [f"{'CrossAttn' * attention}UpBlock2D" for attention in reversed(config.attention)],
            "layers_per_block": config.res_blocks,
            "attention_head_dim": [
                config.heads_of(width) for width in widths
            ],  # diffusers' name for the number of heads
            "cross_attention_dim": config.context_dim,
            "transformer_layers_per_block": config.depth,
            "norm_num_groups": config.groups,
            "resnet_time_scale_shift": TIME[config.scale_shift],
            "class_embed_type": POOLED[config.pooled],
            "projection_class_embeddings_input_dim": config.context_dim if config.pooled else None,
        }
        | ({} if config.ff_multiplier == 4 else {"ff_multiplier": config.ff_multiplier})
    )  # a note that diffusers ignores


def unet_config_from_diffusers(values: dict) -> UNetConfig:
    """The UNetConfig that a config.json of UNet2DConditionModel means.

    Raises DataError for a setting that minildm's UNet does not have.
    """
    _refuse_others(values, UNET_AS_HERE)
    time, pooled = values.get("resnet_time_scale_shift", TIME[0]), values.get("class_embed_type")
    for key, value, known in (("resnet_time_scale_shift", time, TIME), ("class_embed_type", pooled, POOLED)):
        if value not in known:
            raise DataError(
                f"{key} is {value!r} in this config.json: minildm builds only {known[0]!r} or {known[1]!r}."
            )
    if pooled and values.get("projection_class_embeddings_input_dim") != values["cross_attention_dim"]:
        raise DataError("class_embed_type is 'simple_projection' of another width than that of the context's tokens.")
    widths = values["block_out_channels"]
    heads = values["attention_head_dim"]
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    sizes = {width // n for width, n in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(sizes) > 1:
        raise DataError(f"attention_head_dim is {heads}: minildm's levels have one number or one size of heads.")
    depth = values.get("transformer_layers_per_block", 1)
    depths = set(depth) if isinstance(depth, list) else {depth}
    if len(depths) > 1:
        raise DataError(f"transformer_layers_per_block is {depth}: minildm's levels have one number of layers.")
    return UNetConfig(
        values["in_channels"],
        values["out_channels"],
        widths[0],
        tuple(_times(width, widths[0]) for width in widths),
        values["layers_per_block"],
        tuple(kind == "CrossAttnDownBlock2D" for kind in values["down_block_types"]),
        context_dim=values["cross_attention_dim"],
        depth=depths.pop(),
        ff_multiplier=values.get("ff_multiplier", 4),
        groups=values["norm_num_groups"],
        scale_shift=time == TIME[1],
        pooled=pooled == POOLED[1],
        **({"heads": heads[0]} if len(set(heads)) == 1 else {"head_size": sizes.pop()}),
    )


def autoencoder_config_to_diffusers(config: AutoencoderConfig, size: int = 32) -> dict:
    """The config.json of diffusers' AutoencoderKL or VQModel, for images of `size` × `size`.

    One scale for all channels is `scaling_factor`; otherwise each channel's statistics are `latents_mean` and
    `latents_std`, as in the pipelines of Stable Diffusion XL. (A VQModel ignores these two; minildm does not.)

    diffusers' classes know no patches. For `patch` p > 1 the model is the one between the folds: it takes and gives
    F.pixel_unshuffle(images, p), with in_channels · p² channels at size / p, and `patch` notes p, which diffusers
    ignores.
    """
    levels = len(config.multipliers)
    alike = len(set(config.latent_scale)) == 1 and not any(config.latent_shift)
    each = bool(config.latent_scale) and not alike
    if config.codes:
        kind = VQ_AS_HERE | {"_class_name": "VQModel", "num_vq_embeddings": config.codes}
    else:
        kind = AUTOENCODER_AS_HERE | {"_class_name": "AutoencoderKL"}
    return kind | {
        "sample_size": size // config.patch,
        "in_channels": config.in_channels * config.patch**2,
        "out_channels": config.in_channels * config.patch**2,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.attention,
        "scaling_factor": config.latent_scale[0] if alike else 1.0 if each else None,
        "latents_mean": list(config.latent_shift) if each else None,
        "latents_std": [1 / scale for scale in config.latent_scale] if each else None,
        **({"patch": config.patch} if config.patch > 1 else {}),  # a note that diffusers ignores
    }


def autoencoder_config_from_diffusers(values: dict) -> AutoencoderConfig:
    """The AutoencoderConfig that a config.json of diffusers' AutoencoderKL or VQModel means, with its note `patch`.

    Raises DataError for a setting that minildm's autoencoder does not have.
    """
    widths, channels, patch = values["block_out_channels"], values["latent_channels"], values.get("patch", 1)
    codes = values["num_vq_embeddings"] if values.get("_class_name") == "VQModel" else 0
    if codes and values.get("vq_embed_dim", channels) not in (None, channels):
        raise DataError(f"vq_embed_dim is {values['vq_embed_dim']}: minildm's codes have the latents' {channels}.")
    _refuse_others(values, (VQ_AS_HERE if codes else AUTOENCODER_AS_HERE) | {"out_channels": values["in_channels"]})
    scale = values.get("scaling_factor", 0.18215)
    shift = values.get("latents_mean") or [values.get("shift_factor") or 0.0] * channels
    std = values.get("latents_std") or [1.0] * channels
    if patch < 1 or values["in_channels"] % patch**2:
        raise DataError(f"patch is {patch}: in_channels = {values['in_channels']} must be a multiple of patch².")
    return AutoencoderConfig(
        values["in_channels"] // patch**2,
        channels,
        widths[0],
        tuple(_times(width, widths[0]) for width in widths),
        values["layers_per_block"],
        values.get("mid_block_add_attention", True),
        values["norm_num_groups"],
        codes=codes,
        patch=patch,
        latent_shift=() if scale is None else tuple(shift),
        latent_scale=() if scale is None else tuple(scale / s for s in std),
    )


def _refuse_others(values: dict, as_here: dict) -> None:
    for key, value in as_here.items():
        if values.get(key, value) != value:
            raise DataError(f"{key} is {values[key]!r} in this config.json: minildm builds only {value!r}.")


def _times(width: int, first: int) -> int:
    if width % first:
        raise DataError(f"a level has {width} channels: minildm needs a multiple of the first level's {first}.")
    return width // first


# Weights.


def to_compvis(model: Part) -> dict[str, torch.Tensor]:
    """The weights under the names of a CompVis checkpoint, "model.diffusion_model.…" or "first_stage_model.…".

    The autoencoder's attention has 1×1 convolutions there, so its matrices become (C, C, 1, 1). CompVis knows no
    patches either: its class, with in_channels · patch² channels, takes and gives folded images.
    """
    names = compvis_names(model)
    weights = {names[k]: v for k, v in _weights(model).items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in weights.items()}


def from_compvis(weights: dict[str, torch.Tensor], config: Config) -> Part:
    """The UNet or the autoencoder of a CompVis checkpoint's state dict; the config says which. Shares its tensors.

    Keys with another prefix belong to other parts of the checkpoint and are left alone.
    Raises DataError that names missing, extra or misshapen keys.
    """
    prefix = _compvis_prefix(config)
    own = {k: v for k, v in weights.items() if k.startswith(prefix)}
    own = {k: v[..., 0, 0] if ".attn_1." in k and v.shape[2:] == (1, 1) else v for k, v in own.items()}
    model = _empty(config)
    load_weights(_Renamed(model, compvis_names(model)), own, "the checkpoint")
    return model


def _empty(config: Config) -> Part:
    """A model without memory for weights."""
    with torch.device("meta"):
        return UNet(config) if isinstance(config, UNetConfig) else make_autoencoder(config)


@dataclass
class _Renamed:
    """A model under the names of its keys elsewhere, so that `load_weights` speaks of those."""

    model: nn.Module
    names: dict[str, str]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {self.names[k]: v for k, v in _weights(self.model).items()}

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        own = {ours: weights[theirs] for ours, theirs in self.names.items()}
        if (codebook := own.get("quantiser.codebook")) is not None:  # as if each code had just been used once
            own |= {"quantiser.counts": codebook.new_ones(len(codebook)), "quantiser.sums": codebook.clone()}
        self.model.load_state_dict(own, assign=True)


def to_diffusers_weights(model: Part) -> dict[str, torch.Tensor]:
    """The weights under diffusers' names. Feed-forward layers narrower than diffusers' fixed 4·dim get zeros.

    A hidden unit whose weights are zero is silent: the output stays the same, and training leaves it at zero.
    Raises ValueError for wider ones.
    """
    names = diffusers_names(model)
    weights = {names[k]: v for k, v in _weights(model).items()}
    if not isinstance(model, UNet) or model.config.ff_multiplier == 4:
        return weights
    if model.config.ff_multiplier > 4:
        raise ValueError(f"diffusers has no feed-forward layers wider than 4·dim, so {model.config} stays here.")
    return {k: resize_feed_forward(k, v, 4 / model.config.ff_multiplier) for k, v in weights.items()}


def resize_feed_forward(key: str, weight: torch.Tensor, factor: float) -> torch.Tensor:
    """One weight under diffusers' name, the hidden layer of a feed-forward widened with zeros, or narrowed.

    That is rows of ff.net.0 (2·hidden, …), values before gates, and columns of ff.net.2.weight (dim, hidden).
    """
    if ".ff.net.0." in key:  # two halves, values and gates
        halves = weight.chunk(2)
        extra = round(len(halves[0]) * (factor - 1))
        return torch.cat([F.pad(half, (0, 0) * (half.ndim - 1) + (0, extra)) for half in halves])
    if key.endswith(".ff.net.2.weight"):
        return F.pad(weight, (0, round(weight.shape[1] * (factor - 1))))
    return weight


def to_diffusers(model: Part | LatentDiffusion, folder: Path | str) -> None:
    """Write a model into a folder from which diffusers' `from_pretrained` loads it.

    A UNet or an autoencoder: config.json and diffusion_pytorch_model.safetensors, for UNet2DConditionModel,
    AutoencoderKL or VQModel. A LatentDiffusion: these in unet/ and vae/, scheduler/ for DDIMScheduler, and
    text_encoder/, which only minildm reads, because τ_θ and its words are no model that diffusers knows: run them here,
    and pass context and mask as `encoder_hidden_states` and `encoder_attention_mask`. An autoencoder with patches
    works on folded images there (see `autoencoder_config_to_diffusers`): unfold what it decodes with F.pixel_shuffle.
    Raises ValueError for a UNet without cross-attention.
    """
    folder = Path(folder)
    if not isinstance(model, LatentDiffusion):
        is_unet = isinstance(model, UNet)
        config = (unet_config_to_diffusers if is_unet else autoencoder_config_to_diffusers)(model.config)
        return _write(folder, config, to_diffusers_weights(model), "diffusion_pytorch_model.safetensors")
    unet, autoencoder, size = model.second_stage.unet, model.autoencoder, model.config.image_size
    to_diffusers(unet, folder / "unet")
    to_diffusers(autoencoder, folder / "vae")
    _write_json(folder / "unet" / "config.json", unet_config_to_diffusers(unet.config, model.latent_shape[-1]))
    _write_json(folder / "vae" / "config.json", autoencoder_config_to_diffusers(autoencoder.config, size))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_to_diffusers(model.config))
    text = {key: value for key, value in asdict(model.config).items() if key in ("words", "text_depth")}
    text = {"_class_name": "minildm.TextEncoder", **text}
    _write(folder / "text_encoder", text, model.second_stage.text_encoder.state_dict(), "model.safetensors")


def from_diffusers(
    source: Path | str | dict[str, torch.Tensor], config: Config | None = None
) -> Part | LatentDiffusion:
    """A model from a folder of diffusers, or from a state dict with diffusers' keys and the config to build.

    The folder of a UNet2DConditionModel, an AutoencoderKL or a VQModel gives a UNet, an AutoencoderKL or an
    AutoencoderVQ; one that `to_diffusers` wrote for a LatentDiffusion gives that. (The whole folder of another pipeline
    holds a text encoder that minildm does not have: give its unet or vae folder.) A state dict's tensors are shared,
    not copied.
    Raises DataError that names missing, extra or misshapen keys, and for a file or a setting that cannot be read.
    """
    if isinstance(source, dict):
        if config is None:
            raise ValueError("a state dict does not say how many heads and groups there are: give the config too.")
        return _from_diffusers_weights(source, config, "the state dict")
    folder = Path(source)
    if (folder / "unet").is_dir():
        return _pipe_from_diffusers(folder)
    values = _read_json(folder / "config.json")
    readers = {
        "UNet2DConditionModel": unet_config_from_diffusers,
        "AutoencoderKL": autoencoder_config_from_diffusers,
        "VQModel": autoencoder_config_from_diffusers,
    }
    kind = values.get("_class_name")
    if kind not in readers:
        raise DataError(f"{folder} holds a {kind}: minildm reads {', '.join(readers)}.")
    try:
        config = readers[kind](values)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} describes no model of minildm: {error}") from None
    path = folder / "diffusion_pytorch_model.safetensors"
    return _from_diffusers_weights(read_safetensors(path)[0], config, path)


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in published autoencoders


def _from_diffusers_weights(weights: dict[str, torch.Tensor], config: Config, origin):
    model = _empty(config)
    if isinstance(config, UNetConfig):
        weights = _narrowed(weights, config.ff_multiplier / 4, origin)
    else:
        weights = {translate(k, OLD_ATTENTION): v for k, v in weights.items()}
    load_weights(_Renamed(model, diffusers_names(model)), weights, origin)
    return model


def _narrowed(weights: dict[str, torch.Tensor], factor: float, origin: Path | str) -> dict[str, torch.Tensor]:
    """Take the zeros away that `to_diffusers_weights` put into feed-forward layers."""
    if factor == 1:
        return weights
    narrow = {k: resize_feed_forward(k, v, factor) for k, v in weights.items()}
    for key, weight in weights.items():
        if narrow[key] is not weight and not torch.equal(resize_feed_forward(key, narrow[key], 1 / factor), weight):
            raise DataError(f"{key} in {origin} has weights beyond a feed-forward layer of {4 * factor:g}·dim.")
    return narrow


def _pipe_from_diffusers(folder: Path) -> LatentDiffusion:
    text = _read_json(folder / "text_encoder" / "config.json")
    if text.get("_class_name") != "minildm.TextEncoder":
        raise DataError(f"the text encoder in {folder} is not minildm's: give its folder unet or vae alone.")
    unet, autoencoder = from_diffusers(folder / "unet"), from_diffusers(folder / "vae")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        schedule = scheduler_from_diffusers(scheduler)
    except KeyError as error:
        raise DataError(f"the scheduler in {folder} has no counterpart in minildm: {error}.") from None
    try:
        size = _read_json(folder / "vae" / "config.json")["sample_size"] * autoencoder.config.patch
        words, depth = tuple(text["words"]), text["text_depth"]
        model = LatentDiffusion(LDMConfig(autoencoder.config, unet.config, words, depth, **schedule, image_size=size))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the configs in {folder} do not describe a pipeline of minildm ({error!r}).") from None
    path = folder / "text_encoder" / "model.safetensors"
    load_weights(model.second_stage.text_encoder, read_safetensors(path)[0], path)
    model.autoencoder, model.second_stage.unet = autoencoder, unet
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()


SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler_to_diffusers(config: LDMConfig) -> dict:
    """The scheduler_config.json of a DDIMScheduler that samples as `LatentDiffusion.sample` does by default."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": SCHEDULES[config.schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": TARGETS[config.target],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "clip_sample": False,
    }


def scheduler_from_diffusers(values: dict) -> dict:
    """The fields schedule, beta_start, beta_end and target of an LDMConfig."""
    kind = {theirs: ours for ours, theirs in SCHEDULES.items()}[values["beta_schedule"]]
    target = {theirs: ours for ours, theirs in TARGETS.items()}[values["prediction_type"]]
    return {
        "schedule": kind,
        "beta_start": values["beta_start"],
        "beta_end": values["beta_end"],
        "target": target,
    }


def _write(folder: Path, config: dict, weights: dict[str, torch.Tensor], name: str) -> None:
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    write_atomically(folder / name, lambda file: save_file(weights, file, {"format": "pt"}))
    _write_json(folder / "config.json", config)


def _write_json(path: Path, values: dict) -> None:
    write_atomically(path, lambda file: file.write_text(json.dumps(values, indent=1)))


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: give a folder that diffusers or to_diffusers wrote.") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): restore it.") from None
