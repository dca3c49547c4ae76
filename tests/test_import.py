"""What an import costs, and that every public name says what it is."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import minildm

MODULES = sorted(module.name for module in pkgutil.walk_packages(minildm.__path__, "minildm."))
ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_takes_less_than_two_seconds():
    code = "import time; t = time.perf_counter(); import minildm; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(2)) < 2


@pytest.mark.parametrize("name", ["minildm", "minildm.pipeline", "minildm.viz"])
def test_torchvision_is_imported_only_where_it_is_used(name):
    assert (
        python(f"import {name}, sys; print('torchvision' in sys.modules, 'diffusers' in sys.modules)")
        == "False False\n"
    )


def test_the_public_face():
    from minildm.pipeline import LatentDiffusion

    assert minildm.LatentDiffusion is LatentDiffusion
    with pytest.raises(AttributeError, match="no attribute 'LatentDiffusionModel'"):
        _ = minildm.LatentDiffusionModel


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    own = [
        (key, value)
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
    ]
    own += [
        (f"{key}.{method}", function)
        for key, value in own
        if inspect.isclass(value)
        for method, function in vars(value).items()
        if not method.startswith("_") and method != "forward" and (callable(function) or isinstance(function, property))
    ]
    assert [key for key, value in own if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{key}(")] == []
