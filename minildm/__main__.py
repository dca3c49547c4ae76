"""The command line: python -m minildm demo | sample | train | evaluate | experiment | bench."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

SAMPLING = {  # the defaults of what says how to draw
    "steps": 20,
    "sampler": "ddim",
    "guidance_scale": 2.0,
    "guidance_interval": (0, math.inf),
    "guidance_rescale": 0.0,
}


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """The options of guidance: how much, at which steps (all by default), and how much of its length to give back."""
    parser.add_argument("--guidance-scale", type=float, default=SAMPLING["guidance_scale"])
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=SAMPLING["guidance_interval"],
        metavar=("LOW", "HIGH"),
        help="guide only at steps LOW <= t < HIGH of the 1000",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=SAMPLING["guidance_rescale"],
        metavar="SHARE",
        help="give guided predictions back their deviation, 0 (not) to 1",
    )


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser("python -m minildm", description="Latent diffusion, from raw MNIST to a prompt.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="draw ten digits with the shipped weights")
    demo.add_argument("--out", type=Path, default=Path("demo.png"))

    sample = commands.add_parser("sample", help="draw what a prompt says")
    sample.add_argument("prompts", nargs="+", help='such as "a thick slanted seven"')
    sample.add_argument("--model", default="mnist-text", help="a shipped name or a folder")
    sample.add_argument("--count", type=int, default=8, help="images for each prompt")
    sample.add_argument("--steps", type=int, default=SAMPLING["steps"])
    add_guidance(sample)
    sample.add_argument("--sampler", default=SAMPLING["sampler"], help="ddim, ddpm or dpm++")
    sample.add_argument("--eta", type=float, default=0.0, help="share of DDPM's noise in ddim, 0 to 1")
    sample.add_argument("--init", type=Path, help="start from this picture, light on dark (image to image)")
    sample.add_argument("--strength", type=float, help="how much of it to redo, up to 1 (default 0.6)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, default=Path("sample.png"))

    train = commands.add_parser("train", help="train a recipe from raw data; without one, list the recipes")
    train.add_argument("recipe", nargs="?")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, help="wall clock of the training (default 5)")
    length.add_argument("--steps", type=int, help="optimiser steps of all stages together")
    train.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    evaluate = commands.add_parser("evaluate", help="measure a model and write its figures")
    evaluate.add_argument("model", help="a shipped name or a folder")
    evaluate.add_argument("--samples", type=int, default=10_000)
    evaluate.add_argument("--steps", type=int, default=SAMPLING["steps"])
    add_guidance(evaluate)
    evaluate.add_argument("--sampler", default=SAMPLING["sampler"], help="ddim, ddpm or dpm++")
    evaluate.add_argument("--out", type=Path, help="default metrics.json in the folder, or runs/evaluate/NAME.json")

    experiment = commands.add_parser("experiment", help="one of the paper's experiments in miniature")
    experiment.add_argument("name", nargs="?", help="which one; without a name, list them")
    experiment.add_argument("--seconds", type=positive, help="length of each training, where there is one")
    experiment.add_argument("--samples", type=int, help="images to measure on, where images are")
    experiment.add_argument("--work", type=Path, help="folder for what is done so far (default runs/NAME)")
    experiment.add_argument("--out", type=Path, help="the JSON file to write (default data/results/NAME.json)")

    commands.add_parser("bench", help="time both stages and sampling on this machine")
    return parser


def run_demo(args: argparse.Namespace) -> None:
    """Ten digits from prompts, and the seconds that each stage took."""
    start = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal start
        print(f"{time.perf_counter() - start:6.2f} s  {what}")
        start = time.perf_counter()

    from minildm.data import DIGIT_NAMES, seeded
    from minildm.pipeline import LatentDiffusion
    from minildm.sampling import sample, timesteps
    from minildm.viz import save_png

    lap("import")
    model = LatentDiffusion.from_pretrained("mnist-text")
    lap("load the weights")
    import torch

    with torch.no_grad():
        prompts = [f"{'an' if name == 'eight' else 'a'} {name}" for name in DIGIT_NAMES]
        denoise = model.denoiser(prompts, guidance_scale=2.0)
        lap("read the prompts (transformer)")
        generator = seeded(0)
        z = torch.randn(len(prompts), *model.latent_shape, generator=generator)
        for z in sample(denoise, model.schedule, z, timesteps(model.schedule, 20), generator):  # noqa: B007, B020
            pass
        lap("denoise 10 latents in 20 steps with guidance (UNet)")
        images = model.decode(z)
        lap("decode them to images (autoencoder)")
    save_png(images, args.out)
    lap(f"write {args.out}")


def run_sample(args: argparse.Namespace) -> None:
    """A PNG grid, one row for each prompt."""
    from minildm.data import pick_device
    from minildm.pipeline import LatentDiffusion
    from minildm.viz import load_png, save_png

    if args.count < 1:
        raise ValueError(f"--count must be at least 1, not {args.count}.")
    if args.strength is not None and args.init is None:
        raise ValueError("--strength says how much of a picture to redo: give the picture with --init.")
    if args.eta and args.sampler != "ddim":
        raise ValueError(f"--eta belongs to ddim, not to {args.sampler}: leave it out.")
    model = LatentDiffusion.from_pretrained(args.model).to(pick_device())
    images = model.sample(
        [prompt for prompt in args.prompts for _ in range(args.count)],
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_interval=tuple(args.guidance_interval),
        guidance_rescale=args.guidance_rescale,
        seed=args.seed,
        sampler=args.sampler,
        eta=args.eta,
        init=load_png(args.init, model.config.image_size, model.config.autoencoder.in_channels) if args.init else None,
        strength=0.6 if args.strength is None else args.strength,
    )
    save_png(images, args.out, columns=args.count)
    print(f"wrote {args.out}")


def run_train(args: argparse.Namespace) -> None:
    """Train a recipe, or list the recipes."""
    from minildm.recipes import RECIPES, find_recipe, train_recipe
    from minildm.training import Budget

    if args.recipe is None:
        for name, recipe in RECIPES.items():
            print(f"{name:18} {' '.join(type(recipe).__doc__.split())}")
        return
    find_recipe(args.recipe)
    out = args.out or Path("runs") / args.recipe
    if args.steps is not None and args.steps < 2:
        raise ValueError(f"--steps must be at least 2, not {args.steps}.")
    budget = Budget(steps=args.steps) if args.steps else Budget(seconds=60 * (args.minutes or 5))
    start = time.monotonic()
    try:
        train_recipe(args.recipe, out, budget, args.resume)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; go on with the same command and --resume --out {out}")
    print(f"wrote {out} after {time.monotonic() - start:.0f} s in all")


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure a text-to-image model or a first stage; print the figures and write them as JSON."""
    from minildm import recipes
    from minildm.data import pick_device, write_atomically
    from minildm.pipeline import LatentDiffusion

    device, judge = pick_device(), recipes.load_judge()
    if recipes.is_first_stage(args.model):
        for option, default in SAMPLING.items():
            if getattr(args, option) != default:
                raise ValueError(f"a first stage draws no samples: leave --{option.replace('_', '-')} out.")
        autoencoder, sampling = recipes.load_autoencoder(args.model).to(device), {}
        figures = recipes.evaluate_first_stage(autoencoder, judge, recipes.load_features().to(device), args.samples)
    else:
        model = LatentDiffusion.from_pretrained(args.model).to(device)
        sampling = {"steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler}
        if tuple(args.guidance_interval) != SAMPLING["guidance_interval"]:
            sampling["guidance_interval"] = tuple(args.guidance_interval)
        if args.guidance_rescale:
            sampling["guidance_rescale"] = args.guidance_rescale
        figures = recipes.evaluate(model, judge, args.samples, **sampling)
        low, high = args.guidance_interval
        if "guidance_interval" in sampling and high == math.inf:  # which JSON does not have
            sampling["guidance_interval"] = (low, len(model.schedule))
    for name, value in figures.items():
        print(f"{name:28} {value:10.4g}")
    folder = Path(args.model)
    beside = (folder / "config.json").exists()  # the model is the folder's, and no shipped one of that name
    path = args.out or (folder / "metrics.json" if beside else Path("runs") / "evaluate" / f"{args.model}.json")
    metrics = sampling | {k: round(v, 6) for k, v in figures.items()}
    write_atomically(path, lambda file: file.write_text(json.dumps(metrics, indent=1)))
    if args.out is None and beside:
        recipes.add_to_card(folder, metrics)
    print(f"wrote {path}")


def run_experiment(args: argparse.Namespace) -> None:
    """Measure one of the experiments, or list them; a second call goes on where the first one stopped."""
    from minildm.data import data_root
    from minildm.experiments import EXPERIMENTS, run_experiment

    if args.name is None:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:14} {experiment.run.__doc__.splitlines()[0]}")
        return
    out = args.out or data_root() / "results" / f"{args.name.replace('-', '_')}.json"
    run_experiment(args.name, out, args.work or Path("runs") / args.name, args.seconds, args.samples)
    print(f"wrote {out}")


def run_bench(args: argparse.Namespace) -> None:
    """Print the benchmark's figures."""
    from minildm.bench import run

    for name, value in run().items():
        print(f"{name:48} {value:10.4g}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Bad input, files or folders end with one sentence and exit code 2."""
    args = build_parser().parse_args(arguments)
    command = {
        "demo": run_demo,
        "sample": run_sample,
        "train": run_train,
        "evaluate": run_evaluate,
        "experiment": run_experiment,
        "bench": run_bench,
    }
    from safetensors import SafetensorError

    from minildm.data import DataError

    try:
        command[args.command](args)
    except (DataError, ValueError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:  # the second where weights cannot be written
        name = getattr(error, "filename2", None) or getattr(error, "filename", None) or "A file"  # where it was to go
        why = getattr(error, "strerror", None) or error
        print(f"{name} cannot be opened or written ({why}): choose another place.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
