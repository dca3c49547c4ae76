"""Steps against quality, for each sampler."""

from functools import partial
from pathlib import Path

from minildm.data import pick_device
from minildm.diffusion import ddpm_sample
from minildm.experiments.common import draw, drawn_figures, held_out, kept, real_figures
from minildm.pipeline import LatentDiffusion
from minildm.sampling import sample

STEPS = (2, 5, 10, 20, 50)
SAMPLERS = {
    "ddpm": partial(sample, sampler="ddpm"),
    "ddpm large variance": partial(ddpm_sample, large_variance=True),
    "ddim": partial(sample, sampler="ddim"),
    "ddim eta 1": partial(sample, sampler="ddim", eta=1.0),
    "dpm++": partial(sample, sampler="dpm++"),
}


def steps(work: Path, samples: int) -> dict:
    """Steps against quality for DDPM, DDIM and DPM-Solver++(2M) (DDIM table 1): the content of steps.json.

    "rows": for each sampler and number of steps, one drawing by the shipped weights for each of the first `samples`
    captions of the test set, without guidance and from the same noise, and the figures of `metrics.measure`.
    "ddpm large variance" is the σ̂ of DDIM's table. "real": as many training images in place of the drawings.
    """
    model, test = LatentDiffusion.from_pretrained("mnist-text").to(pick_device()), held_out(samples)

    def row(name: str, count: int) -> dict:
        print(f"{name}, {count} steps", flush=True)
        parts = model.second_stage, model.config, test.prompts, model.latent_shape, model.decode
        images = partial(draw, *parts, steps=count, walk=SAMPLERS[name])
        return {"sampler": name, "steps": count, "guidance_scale": 1.0} | drawn_figures(images, test)

    rows = [
        kept(work / f"{name.replace(' ', '-')}-{count}.json", lambda n=name, c=count: row(n, c))
        for name in SAMPLERS
        for count in STEPS
    ]
    return {"rows": rows, "real": kept(work / "real.json", lambda: real_figures(test))}
