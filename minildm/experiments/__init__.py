"""The paper's experiments in miniature: `python -m minildm experiment NAME` writes a file in data/results."""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minildm.data import pick_device, sha256, write_atomically
from minildm.experiments import first_stage, guidance, peers, pixel_latent, reuse, scaling, steps
from minildm.experiments.common import SEED, kept
from minildm.pipeline import read_model, weights_root


@dataclass(frozen=True)
class Experiment:
    """`run(work, **options)` returns what is measured; its options with their defaults, None for one it does not take.

    `weights`: the shipped models that it builds on. `seconds`: of one training. `samples`: how many images are
    measured.
    """

    run: Callable[..., dict]
    weights: tuple[str, ...]
    seconds: float | None = None
    samples: int | None = None

    def options(self, name: str, given: dict) -> dict:
        """The options to run with: those given, the defaults for the others, which are None.

        Raises ValueError for an option that the experiment does not take, or samples out of range.
        """
        chosen = {}
        for option, value in given.items():
            default = getattr(self, option)
            if default is None and value is not None:
                raise ValueError(f"the experiment {name} takes no {option}: leave --{option} out.")
            if default is not None:
                chosen[option] = default if value is None else value
        if not 20 <= chosen.get("samples", 20) <= 10_000:
            raise ValueError(f"measure on 20 to 10,000 samples, not {chosen['samples']}.")
        return chosen


JUDGE = "mnist-classifier"
EXPERIMENTS = {
    "first-stage": Experiment(first_stage.first_stage, (JUDGE, "mnist-features"), seconds=40, samples=1600),
    "guidance": Experiment(guidance.guidance, ("mnist-text", JUDGE), samples=2000),
    "steps": Experiment(steps.steps, ("mnist-text", JUDGE), samples=1000),
    "pixel-latent": Experiment(pixel_latent.pixel_latent, ("mnist-kl-f4", JUDGE), seconds=100, samples=400),
    "scaling": Experiment(scaling.scaling, ("mnist-text", JUDGE), seconds=120, samples=400),
    "reuse": Experiment(reuse.reuse, ("mnist-kl-f4", JUDGE), seconds=60, samples=400),
    "peers": Experiment(peers.peers, ("mnist-text",)),
}


def run_experiment(name: str, out: Path, work: Path, seconds: float | None = None, samples: int | None = None) -> None:
    """Run one of EXPERIMENTS and write its result with seed, machine and time to `out`; goes on from what `work` keeps.

    Raises ValueError for an unknown name, an option out of range or not taken, or a folder that keeps parts of a run
    with other settings or weights.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f'there is no experiment "{name}": choose one of {", ".join(EXPERIMENTS)}.')
    options = EXPERIMENTS[name].options(name, {"seconds": seconds, "samples": samples})
    weights = {shipped: sha256(read_model(weights_root() / shipped)[2]) for shipped in EXPERIMENTS[name].weights}
    settings = {"experiment": name, **options, "seed": SEED, "weights": weights}
    before = kept(work / "settings.json", lambda: settings)
    if {key: value for key, value in before.items() if key != "wall_clock"} != settings:
        raise ValueError(
            f"{work} keeps parts of a run with other settings or weights: give another folder with --work."
        )
    result = EXPERIMENTS[name].run(work, **options)
    about = settings | {
        "command": " ".join([f"python -m minildm experiment {name}", *(f"--{k} {v:g}" for k, v in options.items())]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, {pick_device()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wall_clock": sum(json.loads(part.read_text()).get("wall_clock", 0) for part in work.glob("*.json")),
    }
    write_atomically(out, lambda file: file.write_text(json.dumps({"about": about, **result}, indent=1) + "\n"))
