# Exported from notebooks/08_measuring.ipynb by tools/export.py: edit the notebook, not this file.
"""What judges a set of samples: kernel distance, precision and recall, memorisation, words obeyed."""

from dataclasses import dataclass

import torch

from minildm.data import StrokeWords, seeded, to_float, to_uint8
from minildm.judge import DigitClassifier, frechet_distance, predict


def mmd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The unbiased squared maximum mean discrepancy of features (N, D) and (M, D), a scalar that may be negative.

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b) over different a ≠ a', b ≠ b' (Gretton et al., 2012, lemma 6), with
    the kernel k(x, y) = (x·y / D + 1)³ (Bińkowski et al., 2018, section 4).
    """
    (n, d), m = a.shape, len(b)
    k_aa, k_bb, k_ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (k_aa.sum() - k_aa.trace()) / (n * (n - 1)) + (k_bb.sum() - k_bb.trace()) / (m * (m - 1))
    return within - 2 * k_ab.mean()


def kid(a: torch.Tensor, b: torch.Tensor, blocks: int = 10) -> tuple[float, float]:
    """Kernel distance between sets of features (N, D) and (M, D), and its standard error (Bińkowski et al., 2018).

    The mean of `mmd` over `blocks` pairs of disjoint random parts; the error is their deviation over √blocks. Unbiased
    for any N and M if the sets are independent; drawings for the captions of `b` itself get too low a value, by O(1/N).
    Raises ValueError when D differs, for fewer than two blocks, and when a part would have fewer than two features.
    """
    if blocks < 2:
        raise ValueError(f"blocks must be at least 2, not {blocks}: the error is measured between them.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 * blocks:
        raise ValueError(
            f"both sets must have the shape (N, D), the same D and N of at least {2 * blocks} for {blocks} blocks, "
            f"not {tuple(a.shape)}, {tuple(b.shape)}."
        )
    generator = seeded(0)
    parts = [x.double()[torch.randperm(len(x), generator=generator)].tensor_split(blocks) for x in (a, b)]
    values = torch.stack([mmd(p, q) for p, q in zip(*parts, strict=True)])
    return values.mean().item(), (values.std() / blocks**0.5).item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of a set of features (N, D) against real ones (N, D) (Kynkäänniemi et al., 2019, eqs. 1, 2).

    The support of a set is the union of balls around its points, with the distance to the k-th nearest other point as
    radius. Precision: the share of fakes in the support of the reals; recall: of reals in that of the fakes. The
    support changes with N, so sets of different sizes raise ValueError, and so does an N of at most k.
    """
    if real.shape != fake.shape or real.ndim != 2 or len(real) <= k:
        raise ValueError(
            f"both sets must have the same shape (N, D) with N > {k}, not {tuple(real.shape)}, {tuple(fake.shape)}."
        )
    centre = real.double().mean(0)  # distances come from a matmul, which is more exact near the origin
    real, fake = real.double() - centre, fake.double() - centre
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each point (N, D) to its k-th nearest other point, (N,); a point's nearest is itself."""
    return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, -1] for part in x.split(1000)])


def _covered(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """The share of points (N, D) that lie in at least one ball around the centres (M, D) with radii (M,)."""
    inside = torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1000)])  # (N,)
    return inside.double().mean().item()


def nearest(images: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of images (N, C, H, W) to the two nearest of `train` (M, C, H, W), rising, and their indices, (N, 2).

    Distances are those of pixel values (L2). |x - y|²/2 = |x|²/2 + (|y|²/2 - x·y), and the bracket finds the nearest y
    by one matmul.
    """
    x, y = images.flatten(1), train.flatten(1)
    half = y.square().sum(1) / 2  # (M,)
    index = torch.cat([(half - part @ y.T).topk(2, largest=False).indices for part in x.split(250)])
    return (x[:, None] - y[index]).norm(dim=-1), index


def memorised_share(samples: torch.Tensor, unseen: torch.Tensor) -> float:
    """The share of samples that lie suspiciously close to one training image; 0.01 is to be expected of new images.

    Both hold the distances (N, 2) of `nearest`, for samples and for unseen real images. A copy is much nearer to its
    original than to any other image: its first distance over its second is below the lowest 1 % of the unseen images'.
    """
    ratios, usual = (distances[:, 0] / distances[:, 1].clamp(min=1e-12) for distances in (samples, unseen))
    return (ratios < usual.quantile(0.01)).double().mean().item()


def third_accuracy(drawn: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of images drawn in the third (0, 1 or 2) that was wanted, (N,) both, where a word names it (0 or 2)."""
    return (drawn == wanted)[wanted != 1].double().mean().item()


@dataclass(frozen=True)
class Reference:
    """What N samples are held against, measured once.

    The judge and its features (N, D) of N real images; the strokes' words; the training images (M, 1, 32, 32) in
    [-1, 1]; and the distances (N, 2) of the real images to their nearest training images.
    """

    judge: DigitClassifier
    words: StrokeWords
    features: torch.Tensor
    train: torch.Tensor
    distances: torch.Tensor

    @classmethod
    def of(cls, real: torch.Tensor, train: torch.Tensor, words: StrokeWords, judge: DigitClassifier) -> "Reference":
        """From real images (N, 1, 32, 32) that the generator has not seen and its training images, both uint8."""
        real, train = to_float(real), to_float(train)
        _, features = predict(judge, real)
        return cls(judge, words, features, train, nearest(real, train)[0])


def measure(
    images: torch.Tensor, labels: torch.Tensor, thirds: tuple[torch.Tensor, torch.Tensor], reference: Reference
) -> dict[str, float]:
    """All figures of N images (N, 1, 32, 32) in [-1, 1] that were drawn for digits `labels` (N,) in the given `thirds`.

    prompt_accuracy: the share that the judge reads as their label. thickness_accuracy, slant_accuracy: `third_accuracy`
    of each. frechet_distance_N, kid with kid_error, precision and recall: in the judge's features, against the
    reference (kid is too low by O(1/N) when the images were drawn for the captions of its real images).
    nearest_distance: the median distance to the nearest training image over that of the reference's real images;
    memorised: `memorised_share`. Raises ValueError unless there are as many images as in the reference, and 20.
    """
    n = len(images)
    read, features = predict(reference.judge, images)
    drawn = reference.words.thirds(to_uint8(images), labels)
    kid_value, kid_error = kid(features, reference.features)
    precision, recall = precision_recall(reference.features, features)
    distances, _ = nearest(images, reference.train)
    return {
        "samples": n,
        "prompt_accuracy": (read == labels).double().mean().item(),
        "thickness_accuracy": third_accuracy(drawn[0], thirds[0]),
        "slant_accuracy": third_accuracy(drawn[1], thirds[1]),
        f"frechet_distance_{n}": frechet_distance(features, reference.features),
        "kid": kid_value,
        "kid_error": kid_error,
        "precision": precision,
        "recall": recall,
        "nearest_distance": (distances[:, 0].median() / reference.distances[:, 0].median()).item(),
        "memorised": memorised_share(distances, reference.distances),
    }
