"""Lesson 03: the autoencoder's parts by hand, the scale of its latents, and its losses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minildm.autoencoder import (
    AttentionBlock,
    AutoencoderConfig,
    AutoencoderKL,
    Downsample,
    ResBlock,
    Upsample,
    make_autoencoder,
)
from minildm.data import seeded, to_float
from minildm.losses import first_stage_loss_fn, kl_autoencoder_loss, psnr
from minildm.training import batch_indices
from minildm.vae import DiagonalGaussian

SMALL = AutoencoderConfig(channels=4, multipliers=(1, 2, 2), groups=2)


def small_autoencoder(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(**{**SMALL.__dict__, **changes})).requires_grad_(False)


# shapes and sizes


@settings(max_examples=15)
@given(
    in_channels=st.sampled_from([1, 3]),
    latent_channels=st.integers(1, 5),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    res_blocks=st.integers(1, 2),
    attention=st.booleans(),
    patch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_latents_are_f_times_smaller_and_images_come_back_in_their_size(
    in_channels, latent_channels, multipliers, res_blocks, attention, patch, size
):
    config = AutoencoderConfig(in_channels, latent_channels, 4, multipliers, res_blocks, attention, 2, patch=patch)
    autoencoder = AutoencoderKL(config)
    assert config.factor == patch * 2 ** (len(multipliers) - 1)
    x = torch.randn(2, in_channels, size[0] * config.factor, size[1] * config.factor)
    posterior = autoencoder.encode(x)
    assert posterior.mean.shape == posterior.std.shape == (2, latent_channels, *size)
    assert autoencoder.decode(posterior.mean).shape == x.shape


def test_stable_diffusion_s_autoencoder_has_its_parameter_count():
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderConfig(3, 4, 128, (1, 2, 4, 4), 2, True, 32))
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 3, 16, 16), (2, 1, 18, 16), (2, 1, 16, 30)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) with H and W divisible by 4"):
        small_autoencoder().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 20, 16), (2, 1, 16, 12), (2, 4, 8, 8)])
def test_images_that_do_not_fit_the_patches_are_refused(shape):
    for codes in (0, 8):
        autoencoder = make_autoencoder(replace(SMALL, patch=2, codes=codes))
        with pytest.raises(ValueError, match=r"\(B, 1, H, W\) with H and W divisible by 8"):
            autoencoder.encode(torch.zeros(shape))


# patches


@pytest.mark.parametrize("in_channels, patch", [(1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("codes", [0, 8])
def test_patches_are_an_autoencoder_of_folded_images_between_two_folds(in_channels, patch, codes):
    torch.manual_seed(0)
    config = replace(SMALL, in_channels=in_channels, patch=patch, codes=codes)
    patched = make_autoencoder(config).double().eval()
    plain = make_autoencoder(replace(config, in_channels=in_channels * patch**2, patch=1)).double().eval()
    plain.load_state_dict(patched.state_dict())
    x = torch.randn(2, in_channels, 4 * patch, 8 * patch, generator=seeded(0)).double()
    z = patched.latent(x)
    torch.testing.assert_close(z, plain.latent(F.pixel_unshuffle(x, patch)))
    torch.testing.assert_close(patched.decode(z), F.pixel_shuffle(plain.decode(z), patch))


# the parts


@pytest.mark.parametrize("out_channels", [4, 6])
def test_residual_block_by_hand(out_channels):
    torch.manual_seed(0)
    block, x = ResBlock(4, out_channels, 2), torch.randn(2, 4, 5, 5)

    def normed(h, norm):  # each group of channels to mean 0 and deviation 1
        groups = h.unflatten(1, (2, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
        h = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        return h * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        h = normed(h, norm)
        h = F.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)
    shortcut = x
    if out_channels != 4:
        shortcut = torch.einsum("oc,bchw->bohw", block.shortcut.weight[:, :, 0, 0], x)
        shortcut = shortcut + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), shortcut + h)


def test_attention_block_by_hand():
    torch.manual_seed(0)
    block, x = AttentionBlock(4, 2).double(), torch.randn(2, 4, 3, 5).double()
    h = block.norm(x)
    expected = x.clone()
    for b in range(2):
        tokens = h[b].flatten(1).T  # (15, 4)
        scores = block.to_q(tokens) @ block.to_k(tokens).T / math.sqrt(4)
        shares = scores.exp() / scores.exp().sum(1, keepdim=True)
        expected[b] += block.to_out(shares @ block.to_v(tokens)).T.view(4, 3, 5)
    torch.testing.assert_close(block(x), expected)


def test_downsampling_centres_its_window_on_the_lower_right_of_four_pixels():
    down = Downsample(1)
    torch.nn.init.zeros_(down.conv.bias)
    x = torch.randn(1, 1, 6, 4)
    for i in range(3):
        for j in range(3):
            with torch.no_grad():
                down.conv.weight.zero_()[0, 0, i, j] = 1
            padded = torch.zeros(1, 1, 8, 6)
            padded[:, :, :6, :4] = x
            assert torch.equal(down(x), padded[:, :, i : i + 6 : 2, j : j + 4 : 2])


def test_upsampling_repeats_pixels():
    up, x = Upsample(2), torch.randn(1, 2, 3, 4)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1))


# the scale of the latents


def test_latents_have_no_scale_before_it_is_measured():
    autoencoder = small_autoencoder()
    for call in (autoencoder.to_latents, autoencoder.from_latents, autoencoder.standardise):
        with pytest.raises(ValueError, match="call set_latent_statistics"):
            call(torch.zeros(1, 1 if call == autoencoder.to_latents else 4, 8, 8))


def test_measured_latents_have_mean_0_and_deviation_1_in_each_channel():
    autoencoder = small_autoencoder()
    z = torch.randn(50, 4, 3, 5, generator=seeded(0)) * torch.tensor([0.1, 1, 5, 20]).view(4, 1, 1) + 3
    autoencoder.set_latent_statistics(z)
    standard = autoencoder.standardise(z)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    assert autoencoder.config.latent_shift == pytest.approx(z.mean((0, 2, 3)).tolist())


def test_to_latents_and_from_latents_are_encode_and_decode_with_the_scale_between():
    autoencoder, x = small_autoencoder(), torch.randn(6, 1, 16, 16)
    raw = autoencoder.encode(x).mean
    autoencoder.set_latent_statistics(raw)
    z = autoencoder.to_latents(x)
    torch.testing.assert_close(z, (raw - raw.mean((0, 2, 3), True)) / raw.std((0, 2, 3), keepdim=True))
    torch.testing.assert_close(autoencoder.from_latents(z), autoencoder.decode(raw), rtol=1e-4, atol=1e-5)


# losses


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_pixel_by_pixel(kl_weight):
    x_hat, x = torch.randn(2, 1, 3, 4, generator=seeded(0)), torch.randn(2, 1, 3, 4, generator=seeded(1))
    posterior = DiagonalGaussian(torch.randn(2, 6, 2, 2, generator=seeded(2)))
    total = 0.0
    for b in range(2):
        differences = [(p - q) for p, q in zip(x_hat[b].flatten().tolist(), x[b].flatten().tolist(), strict=True)]
        total += sum(abs(d) + d * d for d in differences) + kl_weight * posterior.kl()[b].item()
    loss = kl_autoencoder_loss(x_hat, x, posterior, kl_weight)
    assert loss.item() == pytest.approx(total / 2 / 12, rel=1e-5)


@given(st.floats(0.001, 2))
def test_psnr_of_a_constant_error(error):
    x = torch.zeros(2, 1, 4, 4)
    assert psnr(x + error, x).tolist() == pytest.approx([20 * math.log10(2 / error)] * 2, abs=1e-3)


def test_psnr_is_measured_image_by_image_and_finite_without_error():
    x = torch.zeros(2, 1, 4, 4)
    x_hat = x + torch.tensor([0.0, 0.2]).view(2, 1, 1, 1)
    assert psnr(x_hat, x).tolist() == pytest.approx([10 * math.log10(4e12), 20], abs=1e-3)


def test_the_first_stage_draws_a_batch_then_a_latent():
    autoencoder = small_autoencoder()
    images = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8, generator=seeded(0))
    loss = first_stage_loss_fn(images, 4, kl_weight=0.01)(autoencoder, seeded(5))
    generator = seeded(5)
    x = to_float(images[batch_indices(20, 4, generator)])
    posterior = autoencoder.encode(x)
    expected = kl_autoencoder_loss(autoencoder.decode(posterior.sample(generator)), x, posterior, 0.01)
    assert loss.item() == expected.item()
