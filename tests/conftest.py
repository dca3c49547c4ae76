"""Fixtures that several test modules share, and hypothesis without luck: the same examples on every run."""

import pytest
import tiny
import torch
from hypothesis import settings

from minildm import recipes
from minildm.__main__ import main
from minildm.data import import_torchvision, seeded
from minildm.judge import DigitClassifier
from minildm.pipeline import LatentDiffusion

import_torchvision()  # before a test module imports diffusers, which imports torchvision without the repair
settings.register_profile("minildm", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("minildm")


@pytest.fixture(scope="session")
def mnist():
    return tiny.whole_mnist()


@pytest.fixture(scope="session")
def tiny_model():
    """An untrained model whose last layers are not zero, with the statistics of its latents measured."""
    torch.manual_seed(0)
    model = LatentDiffusion(tiny.CONFIG)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    model.autoencoder.set_latent_statistics(torch.randn(64, 4, 8, 8, generator=seeded(0)) * 2 + 1)
    return model


@pytest.fixture
def tiny_folder(tiny_model, tmp_path):
    """A folder with the tiny model, for the test to damage as it likes."""
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The recipe "tiny" on a part of MNIST, judged by an untrained classifier."""
    monkeypatch.setitem(recipes.RECIPES, "tiny", tiny.RECIPE)
    monkeypatch.setattr(recipes, "load_mnist", tiny.small_mnist)
    torch.manual_seed(0)
    judge = DigitClassifier().eval()
    monkeypatch.setattr(recipes, "load_judge", lambda: judge)
    return judge


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with exit code 2 and one line on stderr; returns that line."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.endswith(".\n"), f"not a sentence: {error}"
        return error

    return run
