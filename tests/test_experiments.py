"""`python -m minildm experiment`: what it writes, that it goes on where it stopped, and what it refuses."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from minildm import recipes
from minildm.__main__ import main
from minildm.data import to_float
from minildm.experiments import EXPERIMENTS, common, first_stage


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two factors on a part of MNIST; returns the arguments of a run that takes seconds."""
    monkeypatch.setattr(first_stage, "FACTORS", (1, 4))
    for module in (common, recipes):
        monkeypatch.setattr(module, "load_mnist", tiny.small_mnist)
    out, work = str(tmp_path / "result.json"), str(tmp_path / "work")
    return ["experiment", "first-stage", "--seconds", "0.5", "--samples", "40", "--out", out, "--work", work]


def test_the_first_stage_experiment_writes_every_figure_and_keeps_what_is_done(small, monkeypatch, capsys):
    assert main(small) == 0
    result = json.loads(Path(small[7]).read_text())
    assert [(row["factor"], row["kind"]) for row in result["rows"]] == [(1, "kl"), (1, "vq"), (4, "kl"), (4, "vq")]
    for row in result["rows"]:
        assert row["train_steps"] >= 1
        assert row["parameters"] > 0
        assert 0 < row["psnr"] < 60
        assert -1 <= row["ssim"] <= 1
        assert row["rfid"] >= 0
        assert (row["nats_per_latent"] is None) == (row["kind"] == "vq") == (row["code_use"] is not None)
    for curve in result["second_stage"]:
        assert len(curve["seconds"]) == len(curve["frechet"]) == len(curve["accuracy"]) == len(curve["steps"]) == 3
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["seconds"][-1] >= 1  # twice the first stage's
        assert curve["samples"] == 10
    assert result["about"]["command"] == "python -m minildm experiment first-stage --seconds 0.5 --samples 40"
    assert {"seed", "machine", "wall_clock"} <= result["about"].keys()

    def no_training(*args, **kwargs):
        raise AssertionError("a part that was done is done again")

    monkeypatch.setattr(first_stage, "train_autoencoder", no_training)
    monkeypatch.setattr(common, "train_with_snapshots", no_training)
    assert main(small) == 0
    assert json.loads(Path(small[7]).read_text())["rows"] == result["rows"]
    small[3] = "2"
    capsys.readouterr()
    assert main(small) == 2
    assert "other settings" in capsys.readouterr().err


def test_pixels_are_their_own_latents():
    images = tiny.small_mnist().x_train[:50]
    latents, back = common.space(1, images, None)
    assert abs(latents.mean()) < 1e-5
    assert abs(latents.std() - 1) < 1e-5
    torch.testing.assert_close(back(latents), to_float(images))


@pytest.mark.parametrize("factor", first_stage.FACTORS)
def test_each_unet_ends_at_four_by_four(factor):
    config = first_stage.unet_config(factor, 3)
    assert 32 // factor // 2 ** (len(config.multipliers) - 1) == 4
    assert config.attention[-1]
    assert not any(config.attention[:-1])


def test_without_a_name_the_experiments_are_listed(capsys):
    assert main(["experiment"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_bad_arguments_are_refused(refused):
    assert f"choose one of {', '.join(EXPERIMENTS)}" in refused("experiment", "last-stage")
    assert "8 to 10,000" in refused("experiment", "first-stage", "--samples", 4)
