"""One first stage under several second stages."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minildm.experiments.common import (
    captioned_mnist,
    draw,
    held_out,
    kept,
    learning_curve,
    quality,
    real_frechet,
    space,
)
from minildm.experiments.first_stage import unet_config
from minildm.pipeline import weights_root
from minildm.recipes import RECIPES

FIRST_STAGE = "mnist-kl-f4"
ALL, EVEN = tuple(range(10)), (0, 2, 4, 6, 8)
STAGES: dict[str, tuple[tuple[int, ...], Callable[[str], str]]] = {  # its digits, and what it is told of a caption
    "unconditional": (ALL, lambda caption: ""),
    "class-conditional": (ALL, lambda caption: caption.split()[-1]),
    "text-conditional": (ALL, lambda caption: caption),
    "even digits": (EVEN, lambda caption: caption),
}


def reuse(work: Path, seconds: float, samples: int) -> dict:
    """One first stage under several second stages (LDM section 3, advantage iii): the content of reuse.json.

    "first_stage": what it costs, once: the seconds of its training, from its card, and of encoding all training images.
    "rows": for each of STAGES, a second stage trained for `seconds` on the same latents, the quality of `samples`
    drawings (accuracy: where a digit was asked for), and the Fréchet distance of as many real training images.
    """
    data, words = captioned_mnist()
    captions = words.captions(data.x_train, data.y_train)
    card = json.loads((weights_root() / FIRST_STAGE / "card.json").read_text())
    start = time.monotonic()
    latents, to_images = space(4, data.x_train, FIRST_STAGE)
    cost = {"name": FIRST_STAGE, "train_seconds": card["seconds"], "encode_seconds": round(time.monotonic() - start, 1)}
    config = replace(RECIPES["mnist-text"].config, unet=unet_config(4, latents.shape[1]))

    def row(name: str) -> dict:
        digits, told = STAGES[name]
        test, index = held_out(samples, digits), torch.isin(data.y_train, torch.tensor(digits)).nonzero()[:, 0]
        prompts, asked = [told(captions[i]) for i in index.tolist()], [told(prompt) for prompt in test.prompts]
        print(name, flush=True)
        curve = learning_curve(
            config,
            latents[index],
            prompts,
            seconds,
            lambda model: quality(draw(model, config, asked, latents.shape[1:], to_images), test),
            shares=(1,),
        )
        last = {key: value[-1] if isinstance(value, list) else value for key, value in curve.items()}
        if not any(asked):
            last["accuracy"] = None
        return {"name": name, "images": len(index), "samples": len(asked), **last, "real_frechet": real_frechet(test)}

    rows = [kept(work / f"{name.replace(' ', '-')}.json", lambda n=name: row(n)) for name in STAGES]
    return {"first_stage": cost, "rows": rows}
