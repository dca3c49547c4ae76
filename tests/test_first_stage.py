"""Lesson 03: the codebook, the whole objective, and first stages trained, stored, loaded and judged."""

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from minildm import recipes
from minildm.__main__ import main
from minildm.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    VectorQuantiser,
    make_autoencoder,
    perplexity,
)
from minildm.data import DataError, seeded, to_float
from minildm.judge import DigitClassifier
from minildm.losses import (
    FeatureNet,
    FirstStage,
    Objective,
    PatchDiscriminator,
    adaptive_weight,
    feature_net_loss_fn,
    first_stage_loss_fn,
    first_stage_terms,
    fooling_loss,
    hinge_loss,
    objective_loss_fn,
    perceptual_distance,
    psnr,
    ssim,
)
from minildm.pipeline import LatentDiffusion, encode_all, weights_root
from minildm.training import (
    Budget,
    TrainState,
    batch_indices,
    load_checkpoint,
    read_safetensors,
    save_checkpoint,
    train,
)

KL = tiny.CONFIG.autoencoder
VQ = replace(KL, codes=16)
FULL = Objective(kl=0.01, perceptual=0.5, adversarial=0.3, start=0.5)


def images(n: int = 8, size: int = 16) -> torch.Tensor:
    """Random images (n, 1, size, size) in [-1, 1]."""
    return torch.rand(n, 1, size, size, generator=seeded(n)) * 2 - 1


def built(config: AutoencoderConfig):
    torch.manual_seed(0)
    return make_autoencoder(config)


def feature_net() -> FeatureNet:
    torch.manual_seed(5)
    return FeatureNet(widths=(4, 6, 8)).requires_grad_(False)


# bad configurations


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"multipliers": ()}, r"multipliers must be 1 to 4 numbers of at least 1, not \(\)"),
        ({"multipliers": (1, 1, 1, 1, 1)}, "multipliers must be 1 to 4 numbers"),
        ({"multipliers": (1, 0)}, "multipliers must be 1 to 4 numbers of at least 1"),
        ({"channels": 12}, r"a multiple of groups = 8, which \[12, 24, 24\] are not"),
        ({"multipliers": (1, 2), "channels": 8, "groups": 16}, "a multiple of groups = 16"),
        ({"channels": 0}, "channels must be at least 1, not 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, not 0"),
        ({"latent_channels": -1}, "latent_channels must be at least 1, not -1"),
        ({"res_blocks": 0}, "res_blocks must be at least 1, not 0"),
        ({"groups": 0}, "groups must be at least 1, not 0"),
        ({"patch": 0}, "patch must be at least 1, not 0"),
        ({"patch": -2}, "patch must be at least 1, not -2"),
        ({"channels": float("nan")}, "channels must be at least 1, not nan"),
        ({"codes": -1}, "codes must be 0 .KL. or at least 2, not -1"),
        ({"codes": 1}, "codes must be 0 .KL. or at least 2, not 1"),
        ({"latent_scale": (1.0,)}, "must have 4 values each, or none"),
        ({"latent_scale": (1.0,) * 4}, "must have 4 values each, or none"),
        ({"latent_scale": (1.0,) * 3, "latent_shift": (1.0,) * 3}, "must have 4 values each, or none"),
    ],
)
def test_a_bad_autoencoder_is_refused_at_construction(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        AutoencoderConfig(**changes)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [30, 0, -4])
def test_an_image_size_that_f_does_not_divide_is_refused_at_construction(size):
    with pytest.raises(ValueError, match=f"image_size must be a multiple of the compression factor 4, not {size}."):
        replace(tiny.CONFIG, image_size=size)


def test_patches_count_in_the_factor_that_the_image_size_must_have():
    patched = replace(tiny.CONFIG, autoencoder=replace(KL, patch=2))
    assert patched.image_size == 32 and patched.autoencoder.factor == 8
    with pytest.raises(ValueError, match="image_size must be a multiple of the compression factor 8, not 36."):
        replace(patched, image_size=36)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"kl": -1.0}, "the weight kl must be a number of at least 0, not -1"),
        ({"codebook": float("nan")}, "the weight codebook must be"),
        ({"perceptual": float("inf")}, "the weight perceptual must be"),
        ({"adversarial": -0.1}, "the weight adversarial must be"),
        ({"start": 1.5}, "start must be a share of the budget between 0 and 1, not 1.5"),
        ({"start": float("nan")}, "start must be a share"),
    ],
)
def test_a_bad_objective_is_refused_at_construction(changes, says):
    with pytest.raises(ValueError, match=says):
        Objective(**changes)


@pytest.mark.parametrize("factor, kind", [(3, "kl"), (16, "vq"), (4, "gan"), (0, "kl")])
def test_a_first_stage_that_no_recipe_builds_is_refused(factor, kind):
    with pytest.raises(ValueError, match=f"a first stage has a factor of 1, 2, 4 or 8 and is kl or vq, not {factor}"):
        recipes.first_stage_recipe(factor, kind)


# the quantiser


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000))
def test_the_nearest_code_is_that_of_a_brute_force_search(codes, dim, seed):
    torch.manual_seed(seed)
    quantiser, z = VectorQuantiser(codes, dim), 2 * torch.randn(2, dim, 3, 2)
    indices = quantiser.nearest(z)
    assert indices.shape == (2, 3, 2)
    book = quantiser.codebook.double()
    for b in range(2):
        for i in range(3):
            for j in range(2):
                distances = [(z[b, :, i, j].double() - code).square().sum().item() for code in book]
                assert distances[indices[b, i, j]] == pytest.approx(min(distances), rel=1e-5, abs=1e-6)
    assert torch.equal(quantiser.lookup(indices)[1, :, 2, 0], quantiser.codebook[indices[1, 2, 0]])


def test_quantising_gives_the_code_and_passes_the_gradient_of_the_identity():
    """The straight-through gradient of f(quantised z) against finite differences of f at the codes, in float64."""
    torch.manual_seed(0)
    quantiser = VectorQuantiser(8, 3).double()
    z = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)

    def f(v):
        return (weight * v.sin()).sum() + (v**3).sum()

    quantised = quantiser(z)
    torch.testing.assert_close(quantised.z, quantiser.lookup(quantised.indices), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(f(quantised.z), z)
    code, step = quantised.z.detach(), 1e-6
    for k in range(z.numel()):
        bump = torch.zeros(z.numel(), dtype=torch.float64)
        bump[k] = step
        slope = (f(code + bump.view_as(z)) - f(code - bump.view_as(z))) / (2 * step)
        assert gradient.flatten()[k].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("by_loss", [False, True])
def test_the_commitment_weight_multiplies_the_encoder_s_term(by_loss):
    torch.manual_seed(0)
    quantiser, z = VectorQuantiser(5, 3, beta=0.2, by_loss=by_loss), torch.randn(2, 3, 2, 2, requires_grad=True)
    quantised = quantiser(z)
    difference = (z - quantiser.lookup(quantised.indices)).detach()
    error = difference.square().mean().item()
    assert quantised.loss.item() == pytest.approx((0.2 + by_loss) * error, rel=1e-5)
    quantised.loss.backward()
    torch.testing.assert_close(z.grad, 0.2 * 2 * difference / z.numel())
    if by_loss:
        expected = torch.zeros(5, 3)
        for index, vector in zip(
            quantised.indices.flatten(), difference.permute(0, 2, 3, 1).reshape(-1, 3), strict=True
        ):
            expected[index] -= 2 * vector / z.numel()
        torch.testing.assert_close(quantiser.codebook.grad, expected)
    else:
        assert not quantiser.codebook.requires_grad


def test_the_codebook_is_the_moving_average_of_its_latents():
    """Three batches by hand: N and m decay with γ, and each code is m / N."""
    torch.manual_seed(0)
    quantiser = VectorQuantiser(3, 2, decay=0.9, dead_below=0.0)
    before = quantiser.codebook.clone()
    counts, sums = torch.zeros(3), torch.zeros(3, 2)
    for step in range(3):
        z = torch.randn(4, 2, 1, 1, generator=seeded(step))
        indices = torch.tensor([0, 1, 1, 0]).view(4, 1, 1)  # nobody chooses code 2
        quantiser.update(z, indices, seeded(0))
        vectors = z[:, :, 0, 0]
        n = torch.tensor([2.0, 2.0, 0.0])
        m = torch.stack([vectors[0] + vectors[3], vectors[1] + vectors[2], torch.zeros(2)])
        counts, sums = 0.9 * counts + 0.1 * n, 0.9 * sums + 0.1 * m
        torch.testing.assert_close(quantiser.codebook[:2], sums[:2] / counts[:2, None])
    assert torch.equal(quantiser.codebook[2], before[2])


def test_a_forward_pass_leaves_the_codebook_alone():
    quantiser = VectorQuantiser(4, 2).train()
    before = {key: value.clone() for key, value in quantiser.state_dict().items()}
    quantiser(torch.randn(2, 2, 3, 3))
    assert all(torch.equal(value, before[key]) for key, value in quantiser.state_dict().items())


@pytest.mark.parametrize("by_loss", [False, True])
def test_dead_codes_are_restarted_on_latents_of_the_batch(by_loss):
    torch.manual_seed(0)
    quantiser = VectorQuantiser(6, 2, by_loss=by_loss)
    quantiser.counts.copy_(torch.tensor([9.0, 9.0, 9.0, 0.1, 0.2, 0.0]))
    quantiser.sums.copy_(quantiser.counts[:, None] * quantiser.codebook)
    z = 50 + torch.randn(3, 2, 2, 2, generator=seeded(1))
    old = quantiser.codebook.detach().clone()
    quantiser.update(z, torch.zeros(3, 2, 2, dtype=torch.long), seeded(2))
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 2)
    picks = vectors[torch.randint(12, (3,), generator=seeded(2))]
    assert torch.equal(quantiser.codebook[3:].detach(), picks) and torch.equal(quantiser.sums[3:], picks)
    assert quantiser.counts[3:].tolist() == [1, 1, 1]
    torch.testing.assert_close(quantiser.codebook[1:3].detach(), old[1:3])


def test_an_untouched_codebook_is_put_on_the_first_batch():
    quantiser = VectorQuantiser(64, 3)
    z = 100 + torch.randn(2, 3, 8, 8, generator=seeded(0))
    assert perplexity(quantiser.nearest(z), 64) < 6  # far from the codes, few of them are ever nearest
    quantiser.update(z, quantiser.nearest(z), seeded(1))
    assert perplexity(quantiser.nearest(z), 64) > 25


@given(st.integers(2, 30), st.integers(1, 30))
def test_perplexity_of_evenly_used_codes_is_their_number(codes, used):
    used = min(used, codes)
    indices = torch.arange(used).repeat(7).view(7, used, 1)
    assert perplexity(indices, codes).item() == pytest.approx(used, rel=1e-5)


def test_perplexity_in_closed_form():
    indices = torch.tensor([0] * 6 + [1] * 3 + [2])
    entropy = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert perplexity(indices, 5).item() == pytest.approx(math.exp(entropy), rel=1e-5)


# both autoencoders


def test_the_codebook_s_size_chooses_the_autoencoder():
    assert isinstance(make_autoencoder(KL), AutoencoderKL) and isinstance(make_autoencoder(VQ), AutoencoderVQ)


def test_the_quantiser_belongs_to_the_decoder():
    autoencoder, x = built(VQ), images(3)
    z = autoencoder.encode(x)
    assert z.shape == (3, 4, 4, 4) and torch.equal(autoencoder.latent(x), z)
    codes = autoencoder.quantiser.lookup(autoencoder.quantiser.nearest(z))
    assert not torch.allclose(codes, z, atol=0.01)
    torch.testing.assert_close(autoencoder.decode(z), autoencoder.decoder(autoencoder.from_z(codes)))
    torch.testing.assert_close(autoencoder.decode(codes + 1e-3), autoencoder.decode(z))  # any point near the code


@pytest.mark.parametrize("config", [KL, VQ])
@torch.no_grad()
def test_standardised_latents_come_back(config):
    autoencoder, x = built(config), images(20)
    raw = autoencoder.latent(x)
    autoencoder.set_latent_statistics(raw)
    z = autoencoder.to_latents(x)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4))
    torch.testing.assert_close(autoencoder.from_latents(z), autoencoder.decode(raw), rtol=1e-4, atol=1e-4)


def test_the_latent_of_kl_is_the_mean_of_its_posterior():
    autoencoder, x = built(KL), images(3)
    assert torch.equal(autoencoder.latent(x), autoencoder.encode(x).mean)


def test_keys_of_shipped_weights_are_kept():
    keys = {key.split(".")[0] for key in built(KL).state_dict()}
    assert keys == {"encoder", "to_moments", "from_z", "decoder"}
    keys = {key.split(".")[0] for key in built(VQ).state_dict()}
    assert keys == {"encoder", "to_codes", "quantiser", "from_z", "decoder"}


def test_the_kl_is_that_of_torch_distributions():
    posterior = built(KL).encode(images(4))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)))


# measures


@pytest.mark.parametrize("size", [(11, 11), (32, 32), (17, 24)])
def test_ssim_and_psnr_are_those_of_scikit_image(size):
    x = torch.rand(3, 2, *size, generator=seeded(0)) * 2 - 1
    x_hat = (x + torch.tensor([0.0, 0.1, 0.6]).view(3, 1, 1, 1) * torch.randn(x.shape, generator=seeded(1))).clamp(
        -1, 1
    )
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for b in range(3):
        a, b_hat = x[b].double().numpy(), x_hat[b].double().numpy()
        expected = structural_similarity((a + 1) / 2, (b_hat + 1) / 2, channel_axis=0, **options)
        assert ssim(x_hat, x)[b].item() == pytest.approx(expected, abs=1e-5)
        if b:
            expected = peak_signal_noise_ratio(a, b_hat, data_range=2.0)
            assert psnr(x_hat, x)[b].item() == pytest.approx(expected, abs=1e-3)


def test_ssim_of_images_smaller_than_its_window_is_refused():
    with pytest.raises(ValueError, match="at least 11×11 pixels, not 10×32"):
        ssim(torch.zeros(1, 1, 10, 32), torch.zeros(1, 1, 10, 32))


def test_the_perceptual_distance_by_hand():
    net, x_hat, x = feature_net(), images(2), images(3)[:2]
    expected = torch.zeros(2)
    for maps_hat, maps in zip(net.features(x_hat), net.features(x), strict=True):
        for b in range(2):
            for i in range(maps.shape[2]):
                for j in range(maps.shape[3]):
                    u, v = maps_hat[b, :, i, j], maps[b, :, i, j]
                    u, v = u / (u @ u + 1e-6).sqrt(), v / (v @ v + 1e-6).sqrt()
                    expected[b] += ((u - v) ** 2).sum() / maps[b, 0].numel()
    torch.testing.assert_close(perceptual_distance(net, x_hat, x), expected, rtol=1e-4, atol=1e-5)
    assert perceptual_distance(net, x, x).tolist() == [0, 0]


def test_the_eyes_and_the_judge_are_different_networks():
    eyes, judge = recipes.RECIPES["mnist-features"], recipes.RECIPES["mnist-classifier"]
    assert eyes.seed != judge.seed
    for net, other in ((FeatureNet(), DigitClassifier()), (DigitClassifier(), FeatureNet())):
        with pytest.raises(RuntimeError):
            net.load_state_dict(other.state_dict())


# the adversary


def test_each_logit_of_the_discriminator_sees_a_patch_of_18_pixels():
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(), images(1, 32).requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (1, 1, 8, 8)
    norm = discriminator.body[3]
    discriminator.body[3] = nn.Identity()  # group normalisation alone looks at the whole image
    (gradient,) = torch.autograd.grad(discriminator(x)[0, 0, 4, 4], x)
    rows, columns = gradient[0, 0].abs().sum(1).nonzero(), gradient[0, 0].abs().sum(0).nonzero()
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 18
    assert isinstance(norm, nn.GroupNorm)


def test_hinge_losses_in_closed_form():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert fooling_loss(fake).item() == pytest.approx(2 / 3)


def test_the_adaptive_weight_is_the_ratio_of_two_gradients():
    """A decoder of one matrix, whose gradients are written by hand."""
    last, h = nn.Parameter(torch.randn(2, 3, generator=seeded(0))), torch.randn(4, 3, generator=seeded(1))
    target, push = torch.randn(4, 2, generator=seeded(2)), torch.randn(4, 2, generator=seeded(3))
    out = h @ last.T
    weight = adaptive_weight(((out - target) ** 2).sum(), (push * out).sum(), last, delta=0.1)
    by_hand = (2 * (out - target).T @ h).norm() / ((push.T @ h).norm() + 0.1)
    torch.testing.assert_close(weight, by_hand.detach())
    assert not weight.requires_grad
    assert adaptive_weight((out**2).sum(), (1e-9 * out).sum(), last, delta=0.0).item() == 1e4  # the ceiling


def terms(config=KL, generator=None, **parts):
    autoencoder = built(config)
    return autoencoder, first_stage_terms(autoencoder, images(), generator or seeded(3), FULL, **parts)


@pytest.mark.parametrize("config", [KL, VQ])
def test_the_objective_term_by_term(config):
    torch.manual_seed(1)
    discriminator, net, x = PatchDiscriminator(), feature_net(), images()
    _, got = terms(config, net=net, discriminator=discriminator)
    autoencoder, generator = built(config), seeded(3)
    if config.codes:
        z = autoencoder.encode(x)
        quantised = autoencoder.quantiser(z)
        regularisation, x_hat = quantised.loss, autoencoder.decode(z)
    else:
        posterior = autoencoder.encode(x)
        x_hat = autoencoder.decode(posterior.sample(generator))
        regularisation = 0.01 * posterior.kl().mean() / 256
    reconstruction = (x_hat - x).abs().mean() + ((x_hat - x) ** 2).mean()
    perceptual = 0.5 * perceptual_distance(net, x_hat, x).mean()
    fooling = -discriminator(x_hat).mean()
    last = autoencoder.decoder.conv_out.weight
    pull, push = (torch.autograd.grad(t, last, retain_graph=True)[0] for t in (reconstruction + perceptual, fooling))
    adversarial = 0.3 * pull.norm() / (push.norm() + 1e-4) * fooling
    hinge = hinge_loss(discriminator(x), discriminator(x_hat))
    expected = (reconstruction, perceptual, regularisation, adversarial, hinge)
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7, msg=name)
    assert got.total().item() == pytest.approx(sum(t.item() for t in expected), rel=1e-4)


def test_a_training_step_updates_the_codebook():
    after, _ = terms(VQ)
    before = built(VQ)
    z = before.encode(images())
    assert not torch.allclose(after.quantiser.codebook, before.quantiser.codebook)
    before.quantiser.update(z, before.quantiser.nearest(z), seeded(3))
    assert torch.equal(after.quantiser.codebook, before.quantiser.codebook)


def test_each_side_of_the_game_moves_its_own_weights_only():
    torch.manual_seed(1)
    discriminator = PatchDiscriminator()
    autoencoder, got = terms(discriminator=discriminator)
    for term, moved, still in (
        (got.adversarial, autoencoder, discriminator),
        (got.discriminator, discriminator, autoencoder),
    ):
        gradients = torch.autograd.grad(term, list(still.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients)
        weights = [p for p in moved.parameters() if p.ndim > 1]
        assert all(g.any() for g in torch.autograd.grad(term, weights, retain_graph=True))
    assert all(p.requires_grad for p in discriminator.parameters())


def test_terms_without_their_network_are_zero():
    _, got = terms()
    assert got.perceptual == got.adversarial == got.discriminator == 0 and got.reconstruction > 0


def test_the_plain_loss_is_the_objective_without_networks():
    data = ((images(20) + 1) * 127.5).to(torch.uint8)
    x, autoencoder, generator = to_float(data[batch_indices(20, 8, seeded(4))]), built(KL), seeded(4)
    plain = first_stage_loss_fn(data, 8)(autoencoder, seeded(4))
    whole = objective_loss_fn(data, 8, Objective())(FirstStage(autoencoder), generator)
    assert plain.item() == pytest.approx(whole.item(), rel=1e-5)
    plain = first_stage_loss_fn(data, 8)(built(VQ), seeded(4))
    autoencoder = built(VQ)
    z = autoencoder.encode(x)
    error = autoencoder.decode(z) - x
    expected = error.abs().mean() + error.square().mean() + autoencoder.quantiser(z).loss
    assert plain.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_adversary_waits_for_its_start():
    torch.manual_seed(0)
    data, spent = ((images(20) + 1) * 127.5).to(torch.uint8), [0.49]
    model = FirstStage(built(KL), PatchDiscriminator())
    loss_fn = objective_loss_fn(data, 8, FULL, feature_net(), lambda: spent[0])
    loss_fn(model, seeded(0)).backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    spent[0] = 0.5
    loss_fn(model, seeded(0)).backward()
    assert all(p.grad.any() for p in model.discriminator.parameters() if p.ndim > 1)


# training


def small_digits() -> torch.Tensor:
    return tiny.small_mnist().x_train


def start(config: AutoencoderConfig, budget: Budget, seed: int = 0):
    """A whole first stage with everything switched on, its state and its loss_fn."""
    torch.manual_seed(seed)
    model = FirstStage(make_autoencoder(config), PatchDiscriminator(channels=4))
    state = TrainState.start(model, 2e-3, seed)
    progress = lambda: budget.progress(state.step, state.elapsed)  # noqa: E731
    return state, objective_loss_fn(small_digits(), 8, FULL, feature_net(), progress)


@pytest.mark.parametrize("config", [KL, VQ])
def test_resuming_with_discriminator_and_codebook_is_bit_exact(config, tmp_path):
    budget = Budget(steps=12)
    whole, loss_fn = start(config, budget)
    for _ in train(whole, loss_fn, budget, 2e-3):
        pass
    torn, loss_fn = start(config, budget)
    for _ in train(torn, loss_fn, budget, 2e-3):
        if torn.step == 7:  # the adversary came at step 6
            break
    save_checkpoint(torn, tmp_path / "checkpoint")
    resumed, loss_fn = start(config, budget)
    torch.manual_seed(99)
    load_checkpoint(resumed, tmp_path / "checkpoint")
    for _ in train(resumed, loss_fn, budget, 2e-3):
        pass
    assert resumed.history == whole.history
    for ours, theirs in ((resumed.model, whole.model), (resumed.ema.model, whole.ema.model)):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert any(p.any() for p in whole.optimiser.state[whole.model.discriminator.body[0].weight].values())


@pytest.mark.parametrize("name", ["mnist-kl-f4", "mnist-vq-f4", "mnist-features"])
def test_a_few_steps_of_each_recipe_lower_its_loss(name):
    recipe, digits = recipes.RECIPES[name], tiny.small_mnist()
    torch.manual_seed(recipe.seed)
    if name == "mnist-features":
        model, loss_fn, steps = FeatureNet(), feature_net_loss_fn(digits.x_train, digits.y_train, 32), 120
    else:
        steps = 24
        model = FirstStage(make_autoencoder(recipe.config), PatchDiscriminator())
        quiet = replace(recipe.objective, start=1.0)  # the game with the adversary has no loss that must fall
        loss_fn = objective_loss_fn(digits.x_train, 8, quiet, FeatureNet().requires_grad_(False), lambda: 0.0)
    state = TrainState.start(model, recipe.stage.lr, recipe.seed)
    for _ in train(state, loss_fn, Budget(steps=steps), recipe.stage.lr):
        pass
    assert sum(state.history[-4:]) < 0.8 * sum(state.history[:4])


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_sweep_s_autoencoders_have_their_factor_and_as_many_latent_channels(factor, kind):
    config = recipes.first_stage_recipe(factor, kind).config
    autoencoder = make_autoencoder(config)
    assert config.factor == config.latent_channels == factor and bool(config.codes) == (kind == "vq")
    assert autoencoder.latent(torch.zeros(1, 1, 32, 32)).shape == (1, factor, 32 // factor, 32 // factor)


@pytest.fixture
def tiny_first_stages(tiny_recipe, monkeypatch):
    """The recipes "tiny-kl" and "tiny-vq" beside "tiny", with an untrained FeatureNet."""
    for name, config in (("tiny-kl", KL), ("tiny-vq", VQ)):
        recipe = recipes.AutoencoderRecipe(config, recipes.Stage(8, 2e-3), FULL)
        monkeypatch.setitem(recipes.RECIPES, name, recipe)
    torch.manual_seed(0)
    net = FeatureNet().requires_grad_(False)
    monkeypatch.setattr(recipes, "load_features", lambda: net)


RATES = {"tiny-kl": {"nats_per_latent"}, "tiny-vq": {"bits_per_latent", "code_use", "perplexity"}}


@pytest.mark.parametrize("codes", [0, 16])
def test_a_first_stage_with_patches_comes_back_from_its_folder(tiny_first_stages, monkeypatch, tmp_path, codes):
    recipe = recipes.AutoencoderRecipe(replace(KL, patch=2, codes=codes), recipes.Stage(8, 2e-3), FULL)
    monkeypatch.setitem(recipes.RECIPES, "tiny-patches", recipe)
    autoencoder = recipes.load_autoencoder(recipes.train_recipe("tiny-patches", tmp_path / "run", Budget(steps=3)))
    assert replace(autoencoder.config, latent_shift=(), latent_scale=()) == recipe.config
    z = autoencoder.to_latents(to_float(small_digits()))
    assert z.shape[1:] == (4, 4, 4) and autoencoder.from_latents(z).shape[1:] == (1, 32, 32)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", RATES)
def test_a_first_stage_is_trained_stored_loaded_and_judged(tiny_first_stages, tmp_path, capsys, name):
    out = tmp_path / "run"
    assert main(["train", name, "--steps", "4", "--out", str(out)]) == 0
    autoencoder = recipes.load_autoencoder(out)
    assert isinstance(autoencoder, AutoencoderVQ if "vq" in name else AutoencoderKL)
    assert not autoencoder.training and not any(p.requires_grad for p in autoencoder.parameters())
    z = autoencoder.to_latents(to_float(small_digits()))
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    average, _ = read_safetensors(out / "checkpoint.safetensors")
    for key, value in autoencoder.state_dict().items():
        assert torch.equal(value, average[f"ema.autoencoder.{key}"])
    before = (out / "model.safetensors").read_bytes()
    assert main(["train", name, "--steps", "4", "--out", str(out), "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == before

    capsys.readouterr()
    assert main(["evaluate", str(out), "--samples", "30"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == {"samples", "psnr", "ssim", "perceptual", "rfid"} | RATES[name]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*metrics, "wrote"]
    assert json.loads((out / "card.json").read_text())["metrics"] == metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_figures_of_a_perfect_first_stage(tiny_first_stages, monkeypatch):
    monkeypatch.setattr(recipes, "_reconstruct", lambda _, x: (x.cpu(), torch.full((len(x),), 512.0)))
    torch.manual_seed(0)
    figures = recipes.evaluate_first_stage(built(KL), DigitClassifier().eval(), recipes.load_features(), 20)
    assert figures["psnr"] > 100 and figures["ssim"] == pytest.approx(1) and figures["perceptual"] == 0
    assert figures["rfid"] == pytest.approx(0, abs=1e-3) and figures["nats_per_latent"] == 2


def test_rates_of_a_codebook():
    rates = torch.tensor([0, 0, 1, 1]).view(1, 2, 2)
    assert recipes._rate_figures(VQ, rates) == {
        "bits_per_latent": 1.0,  # log2(16) / 4 channels
        "code_use": 2 / 16,
        "perplexity": pytest.approx(2),
    }


@pytest.mark.parametrize("n", [1, 10_001])
def test_a_first_stage_judged_on_too_few_or_too_many_images_is_refused(n):
    with pytest.raises(ValueError, match="evaluate on 2 to 10,000 samples"):
        recipes.evaluate_first_stage(built(KL), DigitClassifier(), feature_net(), n)


def test_another_model_is_no_first_stage(tmp_path):
    with pytest.raises(DataError, match="does not describe a first stage"):
        recipes.load_autoencoder("mnist-text")
    with pytest.raises(DataError, match='there is no model "none"'):
        recipes.load_autoencoder("none")
    with pytest.raises(DataError, match="belongs to another model"):
        recipes.load_features("mnist-classifier")


@pytest.mark.parametrize(
    "load",
    [
        lambda: LatentDiffusion.from_pretrained("mnist-text"),
        lambda: recipes.load_autoencoder("mnist-vq-f4"),
        recipes.load_features,
        recipes.load_judge,
    ],
)
def test_a_loaded_model_is_frozen(load):
    model = load()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_whole_tiny_run_on_a_codebook(tiny_recipe, monkeypatch, tmp_path):
    """Both stages of a text-to-image model whose latents are taken before quantisation."""
    recipe = replace(tiny.RECIPE, config=replace(tiny.CONFIG, autoencoder=VQ))
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)
    out = recipes.train_recipe("tiny", tmp_path / "run", Budget(steps=10))
    model = LatentDiffusion.from_pretrained(out)
    assert isinstance(model.autoencoder, AutoencoderVQ)
    x = to_float(small_digits()[:50])
    torch.testing.assert_close(
        encode_all(model.autoencoder, small_digits()[:50]), model.autoencoder.encode(x), rtol=1e-3, atol=1e-4
    )
    assert model.encode(to_float(small_digits())).std((0, 2, 3)).tolist() == pytest.approx([1] * 4, rel=1e-3)
    samples = model.sample(["a seven", ""], steps=3)
    assert samples.shape == (2, 1, 32, 32) and samples.isfinite().all()


# the shipped weights


@pytest.mark.parametrize("name", ["mnist-kl-f4", "mnist-vq-f4"])
@torch.no_grad()
def test_shipped_first_stages_reconstruct_and_their_latents_are_standard(name, mnist):
    autoencoder, x = recipes.load_autoencoder(name), to_float(mnist.x_test[:300])
    assert replace(autoencoder.config, latent_shift=(), latent_scale=()) == recipes.RECIPES[name].config
    z = autoencoder.to_latents(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0.1, atol=0)
    assert psnr(autoencoder.from_latents(z), x).mean() > 25
    if name == "mnist-vq-f4":
        assert perplexity(autoencoder.quantiser.nearest(autoencoder.encode(x)), 256) > 60


def test_shipped_first_stage_cards_hold_their_figures():
    for name, rates in (("mnist-kl-f4", RATES["tiny-kl"]), ("mnist-vq-f4", RATES["tiny-vq"])):
        metrics = json.loads((weights_root() / name / "card.json").read_text())["metrics"]
        assert metrics.keys() == {"samples", "psnr", "ssim", "perceptual", "rfid"} | rates
        assert metrics["samples"] == 10_000


@torch.no_grad()
def test_the_shipped_eyes_read_digits(mnist):
    read = recipes.load_features()(to_float(mnist.x_test[:1000])).argmax(1)
    assert (read == mnist.y_test[:1000]).float().mean() > 0.97
