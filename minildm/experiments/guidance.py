"""Guidance scale against quality and diversity."""

from pathlib import Path

from minildm.data import pick_device
from minildm.experiments.common import drawn_figures, held_out, kept, real_figures
from minildm.pipeline import LatentDiffusion
from minildm.recipes import sample_many

SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
INTERVALS = {  # steps low ≤ t < high to guide in, and the scales there
    "middle": ((100, 700), (1.5, 2.0, 3.0, 5.0, 8.0)),
    "late": ((0, 300), (2.0, 3.0, 4.0, 6.0, 8.0)),
}
SAMPLING = {"sampler": "dpm++", "steps": 20}


def guidance(work: Path, samples: int) -> dict:
    """Guidance scale against quality and diversity (LDM table 10): the content of guidance.json.

    "rows": for each scale, one drawing by the shipped weights for each of the first `samples` captions of the test set,
    and the figures of `metrics.measure`. "middle_rows" and "late_rows": the same, guided only in a part of the steps
    (Kynkäänniemi et al., 2024). "real": as many training images in place of the drawings.
    """
    model, test = LatentDiffusion.from_pretrained("mnist-text").to(pick_device()), held_out(samples)

    def row(sampling: dict) -> dict:
        print(", ".join(f"{name} {value}" for name, value in sampling.items()), flush=True)
        return sampling | drawn_figures(lambda: sample_many(model, test.prompts, **sampling), test)

    def rows(scales: tuple[float, ...], prefix: str, **interval) -> list[dict]:
        settings = [SAMPLING | {"guidance_scale": scale} | interval for scale in scales]
        return [kept(work / f"{prefix}{s['guidance_scale']:g}.json", lambda s=s: row(s)) for s in settings]

    return {
        "rows": rows(SCALES, "w"),
        **{
            f"{part}_rows": rows(scales, f"{part}-w", guidance_interval=interval)
            for part, (interval, scales) in INTERVALS.items()
        },
        "real": kept(work / "real.json", lambda: real_figures(test)),
    }
