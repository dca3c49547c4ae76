"""Guidance scale against quality and diversity."""

from pathlib import Path

from minildm.data import pick_device
from minildm.experiments.common import drawn_figures, held_out, kept, real_figures
from minildm.pipeline import LatentDiffusion
from minildm.recipes import sample_many

SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
SAMPLING = {"sampler": "dpm++", "steps": 20}


def guidance(work: Path, samples: int) -> dict:
    """Guidance scale against quality and diversity (LDM table 10): the content of guidance.json.

    "rows": for each scale, one drawing by the shipped weights for each of the first `samples` captions of the test set,
    and the figures of `metrics.measure`. "real": as many training images in place of the drawings.
    """
    model, test = LatentDiffusion.from_pretrained("mnist-text").to(pick_device()), held_out(samples)

    def row(scale: float) -> dict:
        print(f"guidance scale {scale:g}", flush=True)
        sampling = SAMPLING | {"guidance_scale": scale}
        return sampling | drawn_figures(lambda: sample_many(model, test.prompts, **sampling), test)

    rows = [kept(work / f"w{scale:g}.json", lambda w=scale: row(w)) for scale in SCALES]
    return {"rows": rows, "real": kept(work / "real.json", lambda: real_figures(test))}
