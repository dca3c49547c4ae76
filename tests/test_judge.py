"""The judge and the distance between sets of its features."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, ndimage

from minildm.data import seeded, to_float
from minildm.judge import DigitClassifier, classifier_loss, frechet_distance, predict, shifted_and_sheared


def features(n: int, d: int, seed: int) -> torch.Tensor:
    """Correlated features (n, d) with a mean of their own, in float64."""
    generator = seeded(seed)
    mix = torch.randn(d, d, generator=generator)
    return (torch.randn(n, d, generator=generator) @ mix + torch.randn(d, generator=generator)).double()


@given(n=st.integers(3, 40), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_frechet_distance_is_that_with_scipy_s_matrix_root(n, d, seed):
    a, b = features(n + d, d, seed), features(n + d, d, seed + 1)
    covariances = [np.cov(x.numpy().T).reshape(d, d) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(sum(covariances) - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_frechet_distance_of_separate_dimensions_in_closed_form():
    a = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]]).double()
    b = 3 * a + torch.tensor([1.0, 2.0])
    variances = a.var(0)
    expected = 5 + (variances * (3 - 1) ** 2).sum().item()  # |Δμ|² + Σ (σa - σb)²
    assert frechet_distance(a, b) == pytest.approx(expected)


@given(st.integers(0, 99))
def test_frechet_distance_is_symmetric_invariant_and_zero_for_the_same(seed):
    a, b = features(30, 4, seed), features(30, 4, seed + 1)
    distance = frechet_distance(a, b)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=seeded(seed)).double())
    assert distance > 0
    assert frechet_distance(b, a) == pytest.approx(distance)
    assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(distance)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance)
    assert frechet_distance(a, a[torch.randperm(30, generator=seeded(seed))]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_correlated_gaussians_in_closed_form():
    """In two dimensions tr M^½ = √(tr M + 2 √det M), so no matrix root is needed; the sample moments are made exact."""
    white = torch.randn(50, 2, generator=seeded(0)).double()
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    cov_a, cov_b = (torch.tensor(c).double() for c in ([[2.0, 0.9], [0.9, 1.0]], [[0.5, -0.3], [-0.3, 3.0]]))
    a, b = (white @ torch.linalg.cholesky(c).T for c in (cov_a, cov_b))
    product = cov_a @ cov_b
    cross = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = 1 + 4 + (cov_a + cov_b).trace() - 2 * cross
    assert frechet_distance(a, b + torch.tensor([1.0, -2.0])) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("n, d", [(2, 5), (5, 64), (30, 64), (64, 64)])
def test_frechet_distance_of_fewer_samples_than_features(n, d):
    """With X the centred features, tr (Σa Σb)^½ is the sum of the singular values of Xa Xbᵀ / (n-1)."""
    a, b = features(n, d, 5), features(n, d, 6)
    x, y = (v - v.mean(0) for v in (a, b))
    cross = linalg.svdvals((x @ y.T).numpy()).sum() / (n - 1)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + x.square().sum() / (n - 1) + y.square().sum() / (n - 1)
    assert frechet_distance(a, b) == pytest.approx(expected.item() - 2 * cross, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * expected.item())
    lifted = [np.cov(v.numpy().T) + 1e-9 * np.eye(d) for v in (a, b)]  # scipy's root wants full rank
    root = linalg.sqrtm(lifted[0] @ lifted[1]).real
    assert cross == pytest.approx(np.trace(root), rel=2e-3)


@pytest.mark.parametrize("shapes", [((5, 3), (6, 3)), ((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (1, 3))])
def test_sets_that_cannot_be_compared_are_refused(shapes):
    with pytest.raises(ValueError, match=r"same shape \(N, D\) with N > 1"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return DigitClassifier(8, 16).requires_grad_(False)


def test_prediction_in_parts_is_the_network_s_own(judge):
    images = torch.randn(1203, 1, 32, 32, generator=seeded(0))
    labels, found = predict(judge, images)
    assert labels.shape == (1203,) and found.shape == (1203, 16)
    torch.testing.assert_close(found[[0, 600, 1202]], judge.features(images[[0, 600, 1202]]), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels[::300], judge(images[::300]).argmax(1))


def test_the_loss_is_the_smoothed_cross_entropy_of_augmented_images_with_features_dropped(judge):
    images = torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8, generator=seeded(0))
    labels = torch.arange(40) % 10
    loss = classifier_loss(images, labels, batch_size=16)(judge, seeded(4))
    generator = seeded(4)
    index = torch.randint(40, (16,), generator=generator)
    x = judge.features(shifted_and_sheared(to_float(images[index]), generator))
    kept = torch.rand(x.shape, generator=generator) >= 0.3
    log_p = judge.head(torch.where(kept, x / 0.7, 0)).log_softmax(1)
    wanted = 0.95 * torch.eye(10)[labels[index]] + 0.05 / 10
    assert loss.item() == pytest.approx(-(wanted * log_p).sum(1).mean().item(), rel=1e-5)


def test_augmented_digits_stay_black_outside_and_move_little(mnist):
    images = to_float(mnist.x_train[:200])
    moved = shifted_and_sheared(images, seeded(0))
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert (moved[:, :, 0] < -0.9).float().mean() > 0.98
    ink, ink_moved = ((x + 1).sum((1, 2, 3)) for x in (images, moved))
    assert (ink_moved / ink).mean().item() == pytest.approx(1, abs=0.1)

    def centre(x):
        return np.array([ndimage.center_of_mass(image) for image in (x[:, 0] + 1).numpy()])

    shift = centre(moved) - centre(images)
    assert 0.7 < shift.std() < 1.7  # ±0.12 of half the width: ±1.9 pixels, evenly, deviation 1.1
    assert np.abs(shift.mean(0)).max() < 0.5
    assert torch.equal(moved, shifted_and_sheared(images, seeded(0)))
