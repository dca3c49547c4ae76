# Exported from notebooks/00_start_here.ipynb by tools/export.py: edit the notebook, not this file.
"""Images as tensors in memory, captions measured from the strokes, seeds and devices."""

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DataError(Exception):
    """A data or weight file is missing, truncated or altered; the message says what to do."""


def pick_device() -> torch.device:
    """The best device there is: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own: everything random in minildm, but for first weights, draws from one of these.

    Raises ValueError when the seed does not fit in 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be between -2^63 and 2^64 - 1, not {seed}.")
    return torch.Generator(device).manual_seed(seed)


def data_root() -> Path:
    """The data folder: $MINILDM_DATA if set, else `data/` beside the package."""
    return Path(os.environ.get("MINILDM_DATA", Path(find_spec("minildm").origin).resolve().parent.parent / "data"))


def import_torchvision():
    """torchvision, also where its CUDA build sits beside a CPU-only torch.

    There its import fails because two operators are not registered; declaring their signatures is enough,
    since neither is ever called here. The import takes about a second, so it happens only on use.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision._minildm_library = library  # the declaration lives as long as this object
    return torchvision


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: the file is there whole or not at all."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # the file behind a link
    if not path.name:
        raise ValueError(f"{path} is a folder: give the name of a file in it.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no ordinary file: choose another place.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: images uint8 (N, C, H, W), labels int64 (N,); train and test kept apart."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1, 1] → uint8 [0, 255], values outside clipped; the inverse of `to_float` on its range."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pad_to_multiple(images: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """Pad (N, C, H, W) with black, evenly, until H and W are multiples: 28×28 → 32×32."""
    h, w = (-size % multiple for size in images.shape[-2:])
    return F.pad(images, (w // 2, w - w // 2, h // 2, h - h // 2))


def load_mnist() -> ImageData:
    """MNIST (LeCun et al., 1998), padded to 32×32: 60,000 training and 10,000 test images (N, 1, 32, 32).

    Raises DataError when a shipped file is missing, truncated or altered.
    """
    raw = data_root() / "MNIST" / "raw"
    for name in MNIST_SHA256:
        _unzip_checked(raw / name)
    datasets = import_torchvision().datasets
    train, test = (datasets.MNIST(data_root(), train=train) for train in (True, False))
    x_train, x_test = (pad_to_multiple(part.data[:, None]) for part in (train, test))  # (N, 1, 32, 32)
    return ImageData(x_train, train.targets.long(), x_test, test.targets.long())


def _unzip_checked(path: Path) -> None:
    """Make the IDX file `path` from `path.gz` beside it unless it is there and right."""
    if path.exists() and sha256(path) == MNIST_SHA256[path.name]:
        return
    packed = path.with_name(path.name + ".gz")
    try:
        content = gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{packed} is missing: restore it with `git checkout -- data/MNIST`.") from None
    except (EOFError, OSError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != MNIST_SHA256[path.name]:
        raise DataError(f"{packed} is damaged (wrong checksum): restore it with `git checkout -- data/MNIST`.")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_npz(path: Path | str) -> ImageData:
    """Your own images: an npz with x_train, y_train, x_test, y_test.

    Images are uint8 (N, H, W) or (N, H, W, C), labels whole numbers (N,). Padded with black to a multiple of 16.
    Raises DataError when the file or one of its arrays is missing or has another shape or type.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give the path of an npz file with x_train, y_train, x_test, y_test.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise DataError(f"{path} cannot be read as an npz file ({error}): write it again with numpy.savez.") from None
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}: save all of x_train, y_train, x_test, y_test in it.")
    parts = [_checked_part(path, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    return ImageData(*parts[0], *parts[1])


def _checked_part(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays of one split → tensors (N, C, H, W) uint8 and (N,) int64."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        wanted = "uint8 (N, H, W) or (N, H, W, C) with C = 1 or 3"
        raise DataError(f"{path}: images must be {wanted}, not {images.dtype} {images.shape}.")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be {len(images)} whole numbers, not {labels.dtype} {labels.shape}.")
    images = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    return pad_to_multiple(images.contiguous()), torch.from_numpy(labels.astype(np.int64))


def load_cifar10() -> ImageData:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images (N, 3, 32, 32).

    Reads `cifar10.npz` in the data folder, and makes it from torchvision's download when it is not there.
    Raises DataError when it is not there and cannot be downloaded.
    """
    path = data_root() / "cifar10.npz"
    if not path.exists():
        _download_cifar10(path)
    return load_npz(path)


def _download_cifar10(path: Path) -> None:
    datasets = import_torchvision().datasets
    try:
        train, test = (datasets.CIFAR10(data_root(), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 is not at {path} and could not be downloaded ({error}): connect to a network once, "
            "or put a cifar10.npz there."
        ) from None
    arrays = {"x_train": train.data, "y_train": train.targets, "x_test": test.data, "y_test": test.targets}
    write_atomically(path, lambda temporary: _savez(temporary, arrays))


def _savez(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # an open file, because savez would add .npz to a name
        np.savez(file, **arrays)


def stroke_attributes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Thickness in pixels and slant of the strokes in uint8 images (N, 1, H, W), each (N,) float32.

    Thickness: a stroke of length L and width w has the area wL and an outline of about 2L, and both are sums over the
    image (the outline: of the gradient's length), so w ≈ 2 · area / outline.
    Slant: -μ11 / μ02 with the central moments μ of the ink, the horizontal shift per pixel of height;
    0 is upright, positive leans to the right (y points down, hence the sign).
    """
    parts = [_stroke_attributes(batch) for batch in images.split(500)]  # so that a batch stays in the processor's cache
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _stroke_attributes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ink = images[:, 0].float() / 255  # (N, H, W)
    area = ink.sum((1, 2)).clamp(min=1e-6)  # (N,)
    dy = ink[:, 1:, :-1] - ink[:, :-1, :-1]  # (N, H-1, W-1)
    dx = ink[:, :-1, 1:] - ink[:, :-1, :-1]
    outline = (dx**2 + dy**2).sqrt().sum((1, 2)).clamp(min=1e-6)
    y, x = torch.arange(ink.shape[1]).float()[:, None], torch.arange(ink.shape[2]).float()
    y = y - ((ink * y).sum((1, 2)) / area)[:, None, None]  # (N, H, 1): from the centre of the ink
    x = x - ((ink * x).sum((1, 2)) / area)[:, None, None]  # (N, 1, W)
    mu11, mu02 = (ink * x * y).sum((1, 2)), (ink * y * y).sum((1, 2)).clamp(min=1e-6)
    return 2 * area / outline, -mu11 / mu02


@dataclass(frozen=True)
class StrokeWords:
    """Turns measured strokes into words: the outer thirds of each digit's training images get one, the middle none.

    `thickness` and `slant` hold the two terciles of each digit, (10, 2): a one is thin in another way than an eight.
    """

    thickness: torch.Tensor
    slant: torch.Tensor

    @classmethod
    def measure(cls, images: torch.Tensor, labels: torch.Tensor) -> "StrokeWords":
        """Terciles of training images (N, 1, H, W) uint8 with labels (N,) in 0…9."""
        attributes = stroke_attributes(images)
        thirds = torch.tensor([1 / 3, 2 / 3])
        return cls(*(torch.stack([a[labels == d].quantile(thirds) for d in range(10)]) for a in attributes))

    def thirds(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which third an image is in, 0, 1 or 2, for thickness and for slant: two (N,) int64."""
        measured = stroke_attributes(images)
        return tuple(
            (a[:, None] > t[labels]).sum(1) for a, t in zip(measured, (self.thickness, self.slant), strict=True)
        )

    def captions(self, images: torch.Tensor, labels: torch.Tensor) -> list[str]:
        """The full caption of each image, such as "a thick slanted seven"."""
        thirds = zip(*(t.tolist() for t in self.thirds(images, labels)), labels.tolist(), strict=True)
        return [_phrase(("thin", "", "thick")[i], ("upright", "", "slanted")[j], DIGIT_NAMES[d]) for i, j, d in thirds]


def _phrase(*words: str) -> str:
    """The words that are not empty, behind "a" or "an"."""
    phrase = " ".join(word for word in words if word)
    vowel = phrase[0] in "aeiou" and phrase != "one"
    return f"{'an' if vowel else 'a'} {phrase}"


def drop_words(
    captions: list[str],
    generator: torch.Generator,
    p_thin: float = 0.1,
    p_word: float = 0.5,
    p_all: float = 0.05,
) -> list[str]:
    """Captions with words left out at random, so that "seven", "a thin 3" and "" become valid prompts too.

    A caption goes as a whole with probability `p_all` (for classifier-free guidance). Of the others a share `p_thin` is
    thinned out: each of their words goes with probability `p_word`. Half of the digit names are written as figures.
    """
    longest = max([6, *(len(caption.split()) for caption in captions)])
    draws = torch.rand(len(captions), 3 + longest, generator=generator).tolist()
    return [
        " ".join(_thin_out(caption.split(), draw, p_thin, p_word, p_all))
        for caption, draw in zip(captions, draws, strict=True)
    ]


def _thin_out(words: list[str], draw: list[float], p_thin: float, p_word: float, p_all: float) -> list[str]:
    gone, thinned, figure, *each = draw
    if gone < p_all:
        return []
    if figure < 0.5:
        words = [str(DIGIT_NAMES.index(w)) if w in DIGIT_NAMES else w for w in words]
    return [w for w, d in zip(words, each, strict=False) if d >= p_word] if thinned < p_thin else words
