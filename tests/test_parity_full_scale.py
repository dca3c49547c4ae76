"""Stable Diffusion 1.x: every key and shape against diffusers and CompVis, and forward passes at full size."""

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from minildm import interop
from minildm.autoencoder import AutoencoderConfig, AutoencoderKL
from minildm.data import seeded
from minildm.interop import SD1_AUTOENCODER, SD1_UNET, from_compvis, from_diffusers, to_compvis
from minildm.unet import UNet

pytestmark = pytest.mark.parity

# The configurations as they are published for diffusers, written out by hand: not made by minildm's own translation.
PUBLISHED_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
PUBLISHED_AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNET = (SD1_UNET, UNet2DConditionModel, PUBLISHED_UNET)
AUTOENCODER = (SD1_AUTOENCODER, diffusers.AutoencoderKL, PUBLISHED_AUTOENCODER)


def ours(config) -> torch.nn.Module:
    """A model without contents."""
    with torch.device("meta"):
        return AutoencoderKL(config) if isinstance(config, AutoencoderConfig) else UNet(config)


def theirs(kind: type, published: dict) -> torch.nn.Module:
    """diffusers' model without contents."""
    with torch.device("meta"):
        return kind.from_config(published)


def shapes(weights: dict) -> dict[str, torch.Size]:
    """Every key's shape."""
    return {k: v.shape for k, v in weights.items()}


def test_published_configurations_are_the_named_ones():
    assert interop.unet_config_from_diffusers(PUBLISHED_UNET) == SD1_UNET
    assert interop.autoencoder_config_from_diffusers(PUBLISHED_AUTOENCODER) == SD1_AUTOENCODER
    assert interop.autoencoder_config_to_diffusers(SD1_AUTOENCODER, 512)["scaling_factor"] == 0.18215


@pytest.mark.parametrize("config, count", [(SD1_UNET, 859_520_964), (SD1_AUTOENCODER, 83_653_863)])
def test_parameter_counts_are_the_published_ones(config, count):
    assert sum(p.numel() for p in ours(config).parameters()) == count


@pytest.mark.parametrize("config, kind, published", [UNET, AUTOENCODER])
def test_every_key_and_shape_maps_to_diffusers_and_back(config, kind, published):
    model, oracle = ours(config), theirs(kind, published)
    weights = interop.to_diffusers_weights(model)
    assert shapes(weights) == shapes(oracle.state_dict())
    assert len(set(interop.diffusers_names(model).values())) == len(model.state_dict())
    back = from_diffusers(oracle.state_dict(), config)
    assert shapes(back.state_dict()) == shapes(model.state_dict())


@pytest.mark.parametrize("config, kind, published", [UNET, AUTOENCODER])
def test_every_key_and_shape_maps_to_compvis_and_back(config, kind, published):
    model, oracle = ours(config), theirs(kind, published)
    compvis = to_compvis(model)
    if kind is UNet2DConditionModel:
        settings = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
        converted = convert_ldm_unet_checkpoint(dict(compvis), settings)
    else:
        converted = convert_ldm_vae_checkpoint(dict(compvis), published)
    assert shapes(converted) == shapes(oracle.state_dict())
    assert shapes(from_compvis(compvis, config).state_dict()) == shapes(model.state_dict())


# Keys and shapes as they stand in the published checkpoint, one of each kind.
COMPVIS = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.bias": (1280,),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.middle_block.2.in_layers.0.weight": (1280,),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (640, 960, 1, 1),
    "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.post_quant_conv.bias": (4,),
}


def test_compvis_keys_are_those_of_the_published_checkpoint():
    found = shapes(to_compvis(ours(SD1_UNET)) | to_compvis(ours(SD1_AUTOENCODER)))
    assert len(found) == 686 + 248
    assert {k: tuple(found.get(k, ())) for k in COMPVIS} == COMPVIS


# forward passes, in float32


def random_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a model without contents, of the size that keeps activations of order 1."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, empty in model.state_dict().items():
        fan_in = empty[0].numel() if empty.ndim > 1 else 100
        offset = 1.0 if empty.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
        weights[name] = torch.empty(empty.shape).uniform_(-1, 1, generator=generator) * (3 / fan_in) ** 0.5 + offset
    return weights


@pytest.mark.slow
@torch.no_grad()
def test_the_full_autoencoder_agrees_at_64_by_64():
    oracle = theirs(diffusers.AutoencoderKL, PUBLISHED_AUTOENCODER)
    weights = random_weights(oracle)
    oracle.load_state_dict(weights, assign=True)
    model = from_diffusers(weights, SD1_AUTOENCODER)
    x = torch.rand(1, 3, 64, 64, generator=seeded(0)) * 2 - 1
    posterior, latents = model.encode(x), oracle.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, latents.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.std, latents.std, rtol=1e-5, atol=1e-5)
    decoded, other = model.decode(latents.mean), oracle.decode(latents.mean).sample
    assert decoded.shape == x.shape and other.std() > 1e-2
    torch.testing.assert_close(decoded, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_full_unet_agrees_on_a_16_by_16_latent():
    oracle = theirs(UNet2DConditionModel, PUBLISHED_UNET)
    weights = random_weights(oracle)
    oracle.load_state_dict(weights, assign=True)
    model = from_diffusers(weights, SD1_UNET)  # shares the 3.4 GB of weights
    generator = seeded(0)
    x, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
    t = torch.tensor([421])
    out, other = model(x, t, context), oracle(x, t, context).sample
    assert out.shape == x.shape and other.std() > 1e-2
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)
