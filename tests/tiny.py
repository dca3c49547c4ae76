"""A recipe so small that a whole run takes seconds; as a script, the command line with that recipe in it.

    python tests/tiny.py train tiny --steps 40 --out runs/tiny

The script writes a checkpoint after every step, so that a test can kill it anywhere.
"""

import sys
from dataclasses import replace
from functools import cache

from minildm import recipes
from minildm.autoencoder import AutoencoderConfig
from minildm.data import ImageData, load_mnist
from minildm.pipeline import LDMConfig
from minildm.unet import UNetConfig

CONFIG = LDMConfig(
    autoencoder=AutoencoderConfig(channels=4, multipliers=(1, 1, 2), groups=2),
    unet=UNetConfig(channels=8, multipliers=(1, 2), heads=2, context_dim=8, ff_multiplier=2, groups=4),
    text_depth=1,
)
RECIPE = recipes.TextRecipe(
    CONFIG, first=recipes.MuonStage(8, 2e-3), second=recipes.MuonStage(8, 1e-3), first_share=0.4
)


def figures(n: int) -> set[str]:
    """The names of what `evaluate` returns for n samples."""
    names = {"samples", "prompt_accuracy", "thickness_accuracy", "slant_accuracy", "kid", "kid_error", "psnr"}
    names |= {"precision", "recall", "nearest_distance", "memorised"}
    return names | {f"frechet_distance_{n}", f"real_frechet_distance_{n}"}


@cache
def whole_mnist() -> ImageData:
    """MNIST, read once for all tests."""
    return load_mnist()


@cache
def small_mnist() -> ImageData:
    """The first 600 training and 200 test images."""
    data = whole_mnist()
    return replace(
        data,
        x_train=data.x_train[:600],
        y_train=data.y_train[:600],
        x_test=data.x_test[:200],
        y_test=data.y_test[:200],
    )


if __name__ == "__main__":
    from minildm.__main__ import main

    recipes.RECIPES["tiny"], recipes.load_mnist, recipes.CHECKPOINT_SECONDS = RECIPE, small_mnist, 0
    sys.exit(main(sys.argv[1:]))
