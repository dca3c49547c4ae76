"""Guidance scale against quality and diversity."""

from pathlib import Path

from minildm.data import pick_device
from minildm.experiments.common import drawn_figures, held_out, kept, real_figures
from minildm.pipeline import LatentDiffusion
from minildm.recipes import sample_many

SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
HALF = {"guidance_interval": (0, 500)}  # the steps with less noise
VARIANTS = {"half": HALF, "rescaled": HALF | {"guidance_rescale": 1.0}}  # besides guidance in every step
VARIANT_SCALES = (1.5, 2.0, 2.5, 3.0, 5.0, 8.0)
SAMPLING = {"sampler": "dpm++", "steps": 20}


def guidance(work: Path, samples: int) -> dict:
    """Guidance scale against quality and diversity (LDM table 10): the content of guidance.json.

    "rows": for each scale, one drawing by the shipped weights for each of the first `samples` captions of the test set,
    and the figures of `metrics.measure`. "half_rows": the same, guided only in the half with less noise (Kynkäänniemi
    et al., 2024, guide in an interval). "rescaled_rows": these with their deviation given back (Lin et al., 2023).
    "real": as many training images in place of the drawings.
    """
    model, test = LatentDiffusion.from_pretrained("mnist-text").to(pick_device()), held_out(samples)

    def row(sampling: dict) -> dict:
        print(", ".join(f"{name} {value}" for name, value in sampling.items()), flush=True)
        return sampling | drawn_figures(lambda: sample_many(model, test.prompts, **sampling), test)

    def rows(scales: tuple[float, ...], prefix: str, variant: dict) -> list[dict]:
        settings = [SAMPLING | {"guidance_scale": scale} | variant for scale in scales]
        return [kept(work / f"{prefix}{s['guidance_scale']:g}.json", lambda s=s: row(s)) for s in settings]

    return {
        "rows": rows(SCALES, "w", {}),
        **{f"{name}_rows": rows(VARIANT_SCALES, f"{name}-w", variant) for name, variant in VARIANTS.items()},
        "real": kept(work / "real.json", lambda: real_figures(test)),
    }
