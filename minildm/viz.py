# Exported from notebooks/00_start_here.ipynb by tools/export.py: edit the notebook, not this file.
"""Pictures: one figure style, grids of images, curves, and PNG files."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from minildm.data import DataError, to_float, to_uint8, write_atomically

# Okabe and Ito's colours: told apart by readers with any kind of colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def set_style() -> None:
    """The look of every figure in the course."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "figure.figsize": (7, 2.8),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
            "font.size": 10,
            "legend.frameon": False,
        }
    )


def image_grid(images: torch.Tensor, columns: int = 10, gap: int = 2) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1] → one image (C, rows·(H+gap)-gap, columns·(W+gap)-gap), row by row on white."""
    images = images.detach().float().cpu()
    columns = min(columns, len(images))
    missing = -len(images) % columns
    blank = torch.ones(missing, *images.shape[1:])
    tiles = torch.nn.functional.pad(torch.cat([images, blank]), (0, gap, 0, gap), value=1.0)
    grid = rearrange(tiles, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def _as_picture(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] → uint8 (H, W) or (H, W, 3) for matplotlib."""
    return to_uint8(rearrange(image, "c h w -> h w c")).squeeze(-1).numpy()


def show_images(images: torch.Tensor, columns: int = 10, title: str = "", width: float = 7.0, ax=None) -> None:
    """Draw images (B, C, H, W) in [-1, 1] as a grid, `width` inches wide unless drawn into `ax`."""
    picture = _as_picture(image_grid(images, columns))
    if ax is None:
        height = width * picture.shape[0] / picture.shape[1] + (0.35 if title else 0.05)
        ax = plt.figure(figsize=(width, height)).gca()
    ax.imshow(picture, vmin=0, vmax=255)
    ax.set_title(title)
    ax.axis("off")


def show_rows(rows: dict[str, torch.Tensor], columns: int = 10, width: float = 7.0, title: str = "") -> None:
    """Draw a row of images (B, C, H, W) in [-1, 1] for each label; a row shows its first `columns` images."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, width / columns * len(rows) * 0.87 + 0.3), squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        ax.imshow(_as_picture(image_grid(images[:columns], columns)), vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=11)


def plot_curve(steps, values, xlabel: str, ylabel: str, title: str = "", label: str | None = None, ax=None):
    """A line with named axes, drawn into `ax` or a new figure; returns the axes."""
    ax = ax or plt.figure().gca()
    ax.plot(steps, values, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax


def save_png(images: torch.Tensor, path: Path | str, columns: int = 10, zoom: int = 3) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG grid, each pixel drawn `zoom` times as large."""
    picture = _as_picture(image_grid(images, columns)).repeat(zoom, 0).repeat(zoom, 1)
    write_atomically(Path(path), lambda temporary: Image.fromarray(picture).save(temporary, format="png"))


def load_png(path: Path | str, size: int = 32, channels: int = 1) -> torch.Tensor:
    """A picture file → (1, channels, size, size) in [-1, 1]: shrunk to fit if it is larger, centred on black.

    Transparent parts become black, too. Raises DataError when the file is missing, is no picture, or is too large.
    """
    try:
        picture = Image.open(path)
        if picture.mode.startswith("I"):  # 16 bits, which `convert` would clip
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA"))
        picture = picture.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give the path of a picture file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow says of damaged files
        raise DataError(f"{path} is not a picture that can be read: give a PNG or JPEG file.") from None
    picture.thumbnail((size, size))  # keeps the proportions and never enlarges
    canvas = Image.new(picture.mode, (size, size))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return to_float(torch.from_numpy(np.array(canvas)).reshape(1, size, size, channels).permute(0, 3, 1, 2))
