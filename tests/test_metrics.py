"""What judges a set of samples, against loops, closed forms for Gaussians, and laws."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import KDTree, distance

from minildm import recipes
from minildm.data import StrokeWords, seeded, stroke_attributes, to_float
from minildm.judge import DigitClassifier
from minildm.metrics import (
    Reference,
    kid,
    measure,
    memorised_share,
    mmd,
    nearest,
    precision_recall,
    third_accuracy,
)
from minildm.pipeline import weights_root


def points(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated features (n, d) in float64 around `shift`."""
    generator = seeded(seed)
    return (torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + shift).double()


def rotated(*sets: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The sets turned by the same random rotation."""
    turn, _ = torch.linalg.qr(torch.randn(sets[0].shape[1], sets[0].shape[1], generator=seeded(seed)).double())
    return [x @ turn for x in sets]


# kernel distance


def mmd_by_loops(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased estimate, pair by pair."""
    a, b = a.tolist(), b.tolist()

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    return (
        mean(k(x, y) for x, y in itertools.permutations(a, 2))
        + mean(k(x, y) for x, y in itertools.permutations(b, 2))
        - 2 * mean(k(x, y) for x, y in itertools.product(a, b))
    )


@given(n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_mmd_is_the_double_sum_over_different_pairs(n, m, d, seed):
    a, b = points(n, d, seed), points(m, d, seed + 1, shift=0.5)
    assert mmd(a, b).item() == pytest.approx(mmd_by_loops(a, b), rel=1e-9, abs=1e-9)


def mmd_of_gaussians(mean_a: float, std_a: float, mean_b: float, std_b: float) -> float:
    """In one dimension (xy + 1)³ = Σ C(3, j) xʲ yʲ, so the discrepancy is Σ C(3, j) (difference of j-th moments)²."""

    def moments(mean, std):
        return mean, mean**2 + std**2, mean**3 + 3 * mean * std**2

    pairs = zip(moments(mean_a, std_a), moments(mean_b, std_b), strict=True)
    return sum(math.comb(3, j) * (p - q) ** 2 for j, (p, q) in enumerate(pairs, 1))


@pytest.mark.parametrize("b", [(1.0, 1.0), (0.0, 1.5), (0.5, 0.3)])
def test_kid_of_gaussians_is_their_closed_form_within_its_error(b):
    x = torch.randn(2, 20_000, 1, generator=seeded(1)).double()
    value, error = kid(x[0], b[0] + b[1] * x[1], blocks=20)
    expected = mmd_of_gaussians(0, 1, *b)
    assert abs(value - expected) < 4 * error and error < 0.1 * expected


def test_kid_of_equal_distributions_scatters_around_zero_as_much_as_its_error_says():
    results = [kid(*torch.randn(2, 100, 4, generator=seeded(seed)).double()) for seed in range(300)]
    values, errors = torch.tensor(results).double().T
    assert abs(values.mean()) < 4 * values.std() / 300**0.5  # unbiased, at only ten features a block
    assert (errors.square().mean() / values.var()).item() == pytest.approx(1, abs=0.25)


def test_kid_does_not_depend_on_the_number_of_samples_beyond_its_error():
    a, b = torch.randn(2, 8000, 6, generator=seeded(3)).double()
    (few, few_error), (many, many_error) = kid(a[:400], b[:800] * 1.3), kid(a, b * 1.3)
    assert abs(few - many) < 4 * few_error and many_error < 0.5 * few_error


@given(seed=st.integers(0, 99))
def test_kid_knows_neither_rotations_nor_the_order_of_the_sets_nor_single_precision(seed):
    a, b = points(40, 3, seed), points(40, 3, seed + 1, shift=0.3)
    value, error = kid(a, b)
    assert kid(*rotated(a, b, seed=seed)) == pytest.approx((value, error), rel=1e-6, abs=1e-9)
    assert kid(a, b) == (value, error) and error > 0
    assert kid(a.float(), b.float()) == kid(a.float().double(), b.float().double())
    assert mmd(a, b).item() == pytest.approx(mmd(b, a).item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shapes", [((19, 3), (20, 3)), ((20, 3), (20, 4)), ((20,), (20,)), ((20, 3), (5, 3))])
def test_kid_refuses_sets_that_are_too_small_or_of_other_features(shapes):
    with pytest.raises(ValueError, match="N of at least 20 for 10 blocks"):
        kid(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("blocks", [1, 0, -1])
def test_kid_refuses_so_few_blocks_that_they_have_no_scatter(blocks):
    with pytest.raises(ValueError, match=f"blocks must be at least 2, not {blocks}"):
        kid(*points(20, 3, 0).split(10), blocks=blocks)


# precision and recall


def support_holds(centres: np.ndarray, point: np.ndarray, k: int) -> bool:
    """Whether a point lies in a ball around one of the centres, by sorting all distances of that centre."""
    for i, centre in enumerate(centres):
        others = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)
        if math.dist(centre, point) <= others[k - 1]:
            return True
    return False


@given(n=st.integers(5, 25), d=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_precision_and_recall_are_those_of_a_loop_over_all_pairs(n, d, k, seed):
    real, fake = points(n, d, seed), points(n, d, seed + 1, shift=1.0)
    precision = np.mean([support_holds(real.numpy(), x, k) for x in fake.numpy()])
    recall = np.mean([support_holds(fake.numpy(), x, k) for x in real.numpy()])
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall), abs=1e-12)


def test_precision_and_recall_in_pieces_are_those_of_scipy_s_tree():
    real, fake = points(2300, 8, 0), points(2300, 8, 1)
    found = precision_recall(real, fake)
    for value, centres, others in zip(found, (real, fake), (fake, real), strict=True):
        radii = KDTree(centres).query(centres, k=4)[0][:, 3]
        expected = (distance.cdist(others, centres) <= radii).any(1).mean()
        assert value == pytest.approx(expected, abs=1e-12) and 0.01 < value < 0.99


def test_precision_and_recall_of_intervals_in_closed_form():
    """Fakes fill a quarter of the reals' interval, and half of a second set lies outside of it."""
    grid = torch.arange(1600).double()[:, None] / 1600
    precision, recall = precision_recall(grid, grid / 4)
    assert precision == 1 and recall == pytest.approx(0.25, abs=3e-3)
    precision, recall = precision_recall(grid, grid + 0.5)
    assert precision == pytest.approx(0.5, abs=3e-3) and recall == pytest.approx(0.5, abs=3e-3)


@given(n=st.integers(5, 40), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_laws_of_precision_and_recall(n, d, seed):
    real, fake = points(n, d, seed), points(n, d, seed + 1, shift=1.0)
    precision, recall = precision_recall(real, fake)
    assert precision_recall(fake, real) == (recall, precision)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e6) == (0, 0)
    moved = [3 * x + 7 for x in rotated(real, fake, seed=seed)]
    assert precision_recall(*moved) == pytest.approx((precision, recall), abs=1e-12)
    wider = precision_recall(real, fake, k=4)
    assert wider[0] >= precision and wider[1] >= recall


def test_ten_perfect_digits_drawn_again_and_again_have_precision_but_no_recall():
    real = points(300, 5, 0)
    assert precision_recall(real, real[:10].repeat(30, 1)) == (1, pytest.approx(10 / 300))


@pytest.mark.parametrize("shapes", [((9, 3), (10, 3)), ((9, 3), (9, 4)), ((9,), (9,)), ((3, 3), (3, 3))])
def test_precision_and_recall_refuse_sets_that_cannot_be_compared(shapes):
    with pytest.raises(ValueError, match=r"same shape \(N, D\) with N > 3"):
        precision_recall(*(torch.zeros(shape) for shape in shapes))


# memorisation


def test_the_nearest_are_those_of_scipy_s_tree():
    images, train = torch.rand(600, 1, 4, 4, generator=seeded(0)), torch.rand(900, 1, 4, 4, generator=seeded(1))
    expected, index = KDTree(train.flatten(1).double()).query(images.flatten(1).double(), k=2)
    found, order = nearest(images, train)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (order.numpy() == index).mean() > 0.999  # single precision may swap two that are equally far


def test_a_training_image_is_at_distance_zero_of_itself_to_the_last_digit(mnist):
    train = to_float(mnist.x_train[:500])
    distances, index = nearest(train[100:120], train)
    assert torch.equal(index[:, 0], torch.arange(100, 120)) and torch.equal(distances[:, 0], torch.zeros(20))


@pytest.fixture(scope="module")
def unseen(mnist):
    """Distances of 1000 test images to the nearest of 10,000 training images."""
    return nearest(to_float(mnist.x_test[:1000]), to_float(mnist.x_train[:10_000]))[0]


def test_copies_are_flagged_and_unseen_digits_are_not(mnist, unseen):
    train, generator = to_float(mnist.x_train[:10_000]), seeded(0)
    others = nearest(to_float(mnist.x_test[1000:2000]), train)[0]
    assert memorised_share(others, unseen) < 0.03
    assert memorised_share(unseen, unseen) == 0.01
    noisy = train[:300] + 0.15 * torch.randn(300, 1, 32, 32, generator=generator)
    assert memorised_share(nearest(train[:300], train)[0], unseen) == 1
    assert memorised_share(nearest(noisy, train)[0], unseen) > 0.9
    half = torch.cat([noisy[:100], to_float(mnist.x_test[1000:1100])])
    assert memorised_share(nearest(half, train)[0], unseen) == pytest.approx(0.5, abs=0.05)


def test_smooth_digits_near_to_all_others_are_no_copies(mnist, unseen):
    """The mean of a digit is nearer to the training images than any real one, and it is nobody's copy."""
    train = to_float(mnist.x_train[:10_000])
    means = torch.stack([train[mnist.y_train[:10_000] == d].mean(0) for d in range(10)])
    distances, _ = nearest(means, train)
    assert memorised_share(distances, unseen) == 0
    assert distances[:, 0].median() < unseen[:, 0].median()


# words obeyed, and all figures together


def test_third_accuracy_counts_only_thirds_that_a_word_names():
    wanted, drawn = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 2, 2, 0])
    assert third_accuracy(drawn, wanted) == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def reference(mnist):
    torch.manual_seed(0)
    words = StrokeWords.measure(mnist.x_train, mnist.y_train)
    return Reference.of(mnist.x_test[:200], mnist.x_train[:600], words, DigitClassifier(8, 16).requires_grad_(False))


def test_all_figures_are_those_of_their_functions(mnist, reference):
    images, labels = mnist.x_test[200:400], mnist.y_test[200:400]
    thirds = reference.words.thirds(mnist.x_test[:200], mnist.y_test[:200])
    figures = measure(to_float(images), labels, thirds, reference)
    x = reference.judge.features(to_float(images))
    assert figures["samples"] == 200
    assert figures["prompt_accuracy"] == pytest.approx((reference.judge.head(x).argmax(1) == labels).double().mean())
    assert (figures["kid"], figures["kid_error"]) == pytest.approx(kid(x, reference.features), rel=1e-3)
    assert (figures["precision"], figures["recall"]) == pytest.approx(precision_recall(reference.features, x), abs=0.01)
    trace = np.linalg.eigvals(np.cov(x.T) @ np.cov(reference.features.T)).real.clip(0) ** 0.5
    frechet = ((x.mean(0) - reference.features.mean(0)) ** 2).sum() + x.var(0).sum() + reference.features.var(0).sum()
    assert figures["frechet_distance_200"] == pytest.approx(frechet.item() - 2 * trace.sum(), rel=1e-3, abs=1e-5)
    thick, _ = stroke_attributes(images)
    for third, cut in ((0, lambda t: thick <= t[:, 0]), (2, lambda t: thick > t[:, 1])):
        only = thirds[0].where(thirds[0] == third, 1)  # count this word alone
        expected = cut(reference.words.thickness[labels])[only == third].double().mean()
        alone = measure(to_float(images), labels, (only, thirds[1]), reference)
        assert alone["thickness_accuracy"] == pytest.approx(expected.item())


def test_the_reference_itself_gets_the_best_of_every_figure(mnist, reference):
    images, labels = mnist.x_test[:200], mnist.y_test[:200]
    figures = measure(to_float(images), labels, reference.words.thirds(images, labels), reference)
    assert figures["frechet_distance_200"] == pytest.approx(0, abs=1e-6)
    for name in ("precision", "recall", "thickness_accuracy", "slant_accuracy", "nearest_distance"):
        assert figures[name] == 1, name
    assert figures["memorised"] == 0.01


def test_another_number_of_images_than_in_the_reference_is_refused(mnist, reference):
    images, labels = mnist.x_test[:150], mnist.y_test[:150]
    with pytest.raises(ValueError, match="same shape"):
        measure(to_float(images), labels, reference.words.thirds(images, labels), reference)


# nothing is judged by what it was trained on


def test_the_judge_is_another_network_with_another_seed_than_the_one_in_the_objective():
    judge, features = (recipes.RECIPES[name] for name in ("mnist-classifier", "mnist-features"))
    assert judge.seed != features.seed
    for name, recipe in (("mnist-classifier", judge), ("mnist-features", features)):
        assert json.loads((weights_root() / name / "card.json").read_text())["seed"] == recipe.seed
    judge, features = recipes.load_judge().state_dict(), recipes.load_features().state_dict()
    assert judge.keys() & features.keys() == {"head.weight", "head.bias"}
    assert judge["head.weight"].shape[1] == 128 and features["head.weight"].shape[1] == 64
