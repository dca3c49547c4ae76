"""The command line: what it writes, what it refuses, and runs that survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from PIL import Image
from safetensors import SafetensorError

from minildm import recipes, training
from minildm.__main__ import main
from minildm.pipeline import LatentDiffusion
from minildm.viz import load_png, save_png

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def start(*arguments) -> subprocess.Popen:
    """A process of this Python."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code and what was written to stderr."""
    _, error = process.communicate(timeout=120)
    return process.returncode, error


# what the commands make


def test_sample_writes_a_grid_with_a_row_for_each_prompt(tiny_folder, tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    assert (
        main(["sample", "a one", "7", "--model", str(tiny_folder), "--count", "3", "--steps", "2", "--out", str(out)])
        == 0
    )
    assert capsys.readouterr().out == f"wrote {out}\n"
    model, gap, zoom = LatentDiffusion.from_pretrained(tiny_folder), 2, 3
    save_png(model.sample(["a one"] * 3 + ["7"] * 3, steps=2), tmp_path / "expected.png", columns=3)
    assert out.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert Image.open(out).size == (zoom * (3 * (32 + gap) - gap), zoom * (2 * (32 + gap) - gap))


@pytest.mark.parametrize(
    "options, same",
    [
        (["--sampler", "ddpm"], {"sampler": "ddpm"}),
        (["--sampler", "dpm++", "--seed", "4"], {"sampler": "dpm++", "seed": 4}),
        (["--eta", "1", "--guidance-scale", "0.5"], {"eta": 1.0, "guidance_scale": 0.5}),
        (
            ["--guidance-scale", "5", "--guidance-interval", "200", "700"],
            {"guidance_scale": 5, "guidance_interval": (200, 700)},
        ),
        (["--guidance-scale", "5", "--guidance-rescale", "0.7"], {"guidance_scale": 5, "guidance_rescale": 0.7}),
        (["--init", "init.png", "--strength", "0.4"], {"strength": 0.4}),
    ],
)
def test_options_of_sample_reach_the_sampler(tiny_folder, tmp_path, monkeypatch, options, same):
    monkeypatch.chdir(tmp_path)
    save_png(torch.rand(1, 1, 32, 32) * 2 - 1, "init.png", zoom=1)
    if "--init" in options:
        same = same | {"init": load_png("init.png")}
    assert main(["sample", "a one", "--model", str(tiny_folder), "--count", "1", "--steps", "5", *options]) == 0
    save_png(LatentDiffusion.from_pretrained(tiny_folder).sample(["a one"], steps=5, **same), "expected.png")
    assert Path("sample.png").read_bytes() == Path("expected.png").read_bytes()


def test_demo_draws_ten_digits_and_times_the_stages(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 0
    times = [float(line.split(" s ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(times) == 6 and min(times) >= 0
    assert Image.open(tmp_path / "demo.png").size == (3 * (10 * 34 - 2), 3 * 32)


def test_train_without_a_recipe_lists_the_recipes(capsys):
    assert main(["train"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipes.RECIPES)


def test_train_and_evaluate_write_a_model_and_its_figures(tiny_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--steps", "10"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("100%") == 2 and "s left" in shown and "loss" in shown
    folder = Path("runs/tiny")
    assert main(["evaluate", str(folder), "--samples", "20", "--steps", "2", "--sampler", "dpm++"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == tiny.figures(20) | {"steps", "guidance_scale", "sampler"}
    assert json.loads((folder / "card.json").read_text())["metrics"] == metrics
    *shown, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == list(metrics)[3:] and last == f"wrote {folder / 'metrics.json'}"
    options = ["--samples", "20", "--steps", "2", "--guidance-interval", "100", "inf", "--out", "elsewhere.json"]
    assert main(["evaluate", str(folder), *options, "--guidance-rescale", "0.5"]) == 0
    elsewhere = json.loads(Path("elsewhere.json").read_text())
    assert elsewhere["sampler"] == "ddim" and elsewhere["guidance_interval"] == [100, 1000]
    assert elsewhere["guidance_rescale"] == 0.5 and "guidance_rescale" not in metrics
    late = ["--samples", "20", "--steps", "2", "--guidance-interval", "1200", "1500", "--out", "late.json"]
    assert main(["evaluate", str(folder), *late]) == 0  # no step is guided
    assert json.loads(Path("late.json").read_text())["guidance_interval"] == [1200, 1500]
    assert json.loads((folder / "metrics.json").read_text()) == metrics


# what they refuse


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["a purple seven"], 'unknown word "purple"'),
        (["a a a a a a a seven"], "has 8 words"),
        (["7", "--steps", "0"], "steps must be between 1 and 1000"),
        (["7", "--steps", "-5"], "steps must be between 1 and 1000"),
        (["7", "--steps", "1001"], "steps must be between 1 and 1000"),
        (["7", "--guidance-scale", "nan"], "guidance_scale must be"),
        (["7", "--guidance-scale", "-1"], "guidance_scale must be"),
        (["7", "--guidance-scale", "inf"], "guidance_scale must be"),
        (["7", "--guidance-interval", "700", "200"], "guidance_interval must be two steps"),
        (["7", "--guidance-interval", "nan", "200"], "guidance_interval must be two steps"),
        (["7", "--guidance-rescale", "1.1"], "guidance_rescale must be between 0 and 1"),
        (["7", "--eta", "1.5"], "eta must be between 0"),
        (["7", "--sampler", "euler"], "choose one of ddim, ddpm, dpm++"),
        (["7", "--count", "0"], "--count must be at least 1"),
        (["7", "--seed", "99999999999999999999"], "seed must be between"),
        (["7", "--init", "none.png"], "none.png does not exist: give the path of a picture"),
        (["7", "--init", "config.json"], "is not a picture that can be read: give a PNG"),
        (["7", "--init", "init.png", "--strength", "0"], "strength must be above 0"),
        (["7", "--init", "init.png", "--strength", "nan"], "strength must be above 0"),
        (["7", "--strength", "0.5"], "give the picture with --init"),
        (["7", "--sampler", "dpm++", "--eta", "0.5"], "--eta belongs to ddim, not to dpm++"),
        (["7", "--model", "mnist-txt"], 'there is no model "mnist-txt"'),
        (["7", "--model", "none/at/all"], 'there is no model "none/at/all"'),
        (["7", "--steps", "1", "--out", "config.json/x.png"], "cannot be opened or written"),
    ],
)
def test_sample_refuses_bad_input(tiny_folder, monkeypatch, refused, arguments, says):
    monkeypatch.chdir(tiny_folder)
    save_png(torch.zeros(1, 1, 32, 32), "init.png", zoom=1)
    before = sorted(os.listdir())
    model = [] if "--model" in arguments else ["--model", "."]
    out = [] if "--out" in arguments else ["--out", "out.png"]
    assert says in refused("sample", *arguments, *model, *out)
    assert sorted(os.listdir()) == before


def test_the_place_that_cannot_be_written_is_named_as_it_was_given(tiny_folder, monkeypatch, refused):
    monkeypatch.chdir(tiny_folder)
    Path("folder").mkdir()
    error = refused("sample", "7", "--model", ".", "--steps", 1, "--out", "folder")
    assert error == "folder cannot be opened or written (Is a directory): choose another place.\n"
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["train", "mnist-txt"], 'there is no recipe "mnist-txt": choose one of mnist-text'),
        (["train", "tiny", "--steps", "1"], "--steps must be at least 2"),
        (["train", "tiny", "--steps", "0"], "--steps must be at least 2"),
        (["train", "tiny", "--steps", "4", "--out", "file/below"], "cannot be opened or written"),
        (["train", "tiny", "--steps", "4", "--out", "file"], "cannot be opened or written"),
        (["train", "tiny", "--steps", "4", "--out", "none", "--resume"], "leave out --resume to start one"),
        (["train", "tiny", "--minutes", "0.0001", "--out", "short"], "minutes are too few"),
        (["evaluate", "none"], 'there is no model "none"'),
        (["evaluate", "mnist-classifier"], "does not describe a text-to-image model"),
        (["evaluate", "mnist-text", "--samples", "19"], "evaluate on 20 to 10,000 samples"),
        (["evaluate", "mnist-text", "--samples", "20000"], "evaluate on 20 to 10,000 samples"),
        (["evaluate", "mnist-text", "--samples", "20", "--steps", "0"], "steps must be between 1 and 1000"),
        (["evaluate", "mnist-text", "--samples", "20", "--sampler", "x"], "choose one of ddim"),
        (["evaluate", "mnist-kl-f4", "--samples", "20", "--steps", "5"], "draws no samples: leave --steps out"),
        (["evaluate", "mnist-kl-f4", "--guidance-interval", "0", "500"], "leave --guidance-interval out"),
        (["sample", "7", "--steps", "1", "--out", "."], "is a folder: give the name of a file in it"),
        (["demo", "--out", "file/demo.png"], "cannot be opened or written"),
    ],
)
def test_train_evaluate_and_demo_refuse_bad_input(tiny_recipe, tmp_path, monkeypatch, refused, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    assert says in refused(*arguments)
    assert Path("file").read_text() == "in the way" and not Path("none").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["sample"],
        ["sample", "7", "--steps", "many"],
        ["sample", "7", "--unknown"],
        ["train", "tiny", "--minutes", "0"],
        ["train", "tiny", "--minutes", "-1"],
        ["train", "tiny", "--minutes", "nan"],
        ["train", "tiny", "--minutes", "inf"],
        ["train", "tiny", "--minutes", "x"],
        ["train", "tiny", "--minutes", "1", "--steps", "4"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m minildm")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["train", "mnist-txt"], "there is no recipe"),
        (["sample", "a purple seven", "--out", "{tmp}/x.png"], "unknown word"),
        (["evaluate", "{tmp}"], "there is no model"),
    ],
)
def test_a_real_process_ends_with_code_2_and_one_sentence(tmp_path, arguments, says):
    code, error = finish(start("-m", "minildm", *(a.format(tmp=tmp_path) for a in arguments)))
    assert code == 2
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


# runs


@pytest.fixture
def finished(tiny_recipe, tmp_path):
    """The folder of a finished run of 10 steps."""
    assert main(["train", "tiny", "--steps", "10", "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["tiny", "--steps", "10"], "already holds a run: add --resume"),
        (["tiny", "--steps", "12", "--resume"], "resume with the same recipe and budget"),
        (["tiny", "--minutes", "3", "--resume"], "resume with the same recipe and budget"),
        (["mnist-classifier", "--steps", "10", "--resume"], "resume with the same recipe and budget"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_left_alone(finished, refused, arguments, says):
    before = contents(finished)
    assert says in refused("train", *arguments, "--out", finished)
    assert contents(finished) == before


def test_resuming_a_finished_run_changes_nothing(finished):
    assert main(["evaluate", str(finished), "--samples", "20", "--steps", "1"]) == 0
    before = contents(finished)
    assert "metrics" in json.loads(before["card.json"])
    assert main(["train", "tiny", "--steps", "10", "--out", str(finished), "--resume"]) == 0
    assert contents(finished) == before


def test_figures_of_other_weights_do_not_stay_in_the_card(finished):
    (finished / "card.json").write_text(json.dumps({"metrics": {"samples": 20}}))
    (finished / "model.safetensors").write_bytes(b"others")
    assert main(["train", "tiny", "--steps", "10", "--out", str(finished), "--resume"]) == 0
    assert "metrics" not in json.loads(contents(finished)["card.json"])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("run.json", b"{", "run.json is damaged: start a new run in another folder"),
        ("first_stage.safetensors", b"half", "first_stage.safetensors is damaged"),
        ("second_stage.safetensors", None, "second_stage.safetensors is damaged"),
        ("latents.safetensors", b"", "latents.safetensors is damaged"),
    ],
)
def test_a_damaged_run_is_refused(finished, refused, name, content, says):
    path = finished / name
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert says in refused("train", "tiny", "--steps", "10", "--out", finished, "--resume")


def test_what_is_shipped_is_not_touched_by_measuring_it(tiny_recipe, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path / "data"))
    shipped = tmp_path / "data" / "weights" / "small"
    tiny_model.save_pretrained(shipped)
    (shipped / "card.json").write_text("{}")
    Path("small").mkdir()  # a folder of that name is not the model
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    assert main(["evaluate", "small", "--samples", "20", "--steps", "1"]) == 0
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before and not list(Path("small").iterdir())
    assert json.loads(Path("runs/evaluate/small.json").read_text())["samples"] == 20


def test_a_damaged_card_is_named(finished, refused):
    (finished / "card.json").write_text("{")
    assert "card.json is damaged: restore it" in refused("evaluate", finished, "--samples", 20, "--steps", 1)


@pytest.mark.parametrize("moment", ["EMA.update", "save_checkpoint"])
def test_a_run_interrupted_anywhere_ends_with_the_same_bytes(tiny_recipe, tmp_path, monkeypatch, moment):
    """Ctrl-C in the middle of a step or of saving, in the second stage: nothing of the torn step is kept."""
    monkeypatch.setattr(recipes, "CHECKPOINT_SECONDS", 0)
    whole, torn, calls = tmp_path / "whole", tmp_path / "torn", []
    assert main(["train", "tiny", "--steps", "20", "--out", str(whole)]) == 0
    owner, name = (training.EMA, "update") if moment == "EMA.update" else (recipes, "save_checkpoint")
    original = getattr(owner, name)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(SystemExit, match="--resume --out"):
        main(["train", "tiny", "--steps", "20", "--out", str(torn)])
    assert not (torn / "model.safetensors").exists()
    assert main(["train", "tiny", "--steps", "20", "--out", str(torn), "--resume"]) == 0
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_new_run_takes_nothing_of_an_old_one(tiny_recipe, tmp_path, monkeypatch, interrupted):
    fresh, reused = tmp_path / "fresh", tmp_path / "reused"
    train = ["train", "tiny", "--steps", "10", "--out"]
    assert main([*train, str(reused)]) == 0
    (reused / "run.json").unlink()
    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(tiny.RECIPE, seed=5))
    assert main([*train, str(fresh)]) == 0
    if interrupted:  # before the new run has saved anything
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume --out"):
            patch.setattr(recipes, "run_stage", Mock(side_effect=KeyboardInterrupt))
            main([*train, str(reused)])
    assert main([*train, str(reused), *["--resume"] * interrupted]) == 0
    assert (reused / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(28, "No space left on device"), "A file cannot be opened or written (No space left on device)"),
        (SafetensorError("I/O error: no space"), "A file cannot be opened or written (I/O error: no space)"),
        (FloatingPointError("the loss is nan at step 3: lower the learning rate."), "the loss is nan at step 3"),
    ],
)
def test_a_full_disk_and_a_loss_that_explodes_end_with_one_sentence(
    tiny_recipe, tmp_path, monkeypatch, refused, error, says
):
    def fail(*args):
        raise error

    monkeypatch.setattr(recipes, "save_checkpoint", fail)
    assert says in refused("train", "tiny", "--steps", "10", "--out", tmp_path / "run")


def kill_once(path: Path, *arguments) -> None:
    """Run the tiny command line and SIGKILL it as soon as the file exists."""
    process = start(Path(__file__).parent / "tiny.py", *arguments)
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a process cannot be killed like this")
def test_a_run_killed_twice_ends_with_the_same_bytes_as_one_that_was_not(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    command = ["train", "tiny", "--steps", 60]
    undisturbed = start(Path(__file__).parent / "tiny.py", *command, "--out", whole)

    kill_once(torn / "first_stage.safetensors", *command, "--out", torn)
    assert not (torn / "model.safetensors").exists()
    kill_once(torn / "second_stage.safetensors", *command, "--out", torn, "--resume")
    assert not (torn / "model.safetensors").exists()
    assert finish(start(Path(__file__).parent / "tiny.py", *command, "--out", torn, "--resume")) == (0, "")

    assert finish(undisturbed) == (0, "")
    for name in ("model.safetensors", "config.json"):
        assert (torn / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((torn / "card.json").read_text())["steps"] == [24, 36]
