"""The package is what the notebooks export, and a module imports only from modules that a learner has already met."""

import ast
import shutil

import nbformat
import pytest

from tools import export

UNET = "# The UNet\n\n> Predicts the noise.\n"


def make_notebook(root, name, *cells, title=UNET):
    """Write a notebook of a title and code cells under `root`, beside a package with a hand-written __init__."""
    for folder in ("notebooks", "minildm"):
        (root / folder).mkdir(exist_ok=True)
    (root / "minildm" / "__init__.py").write_text("")
    cells = [nbformat.v4.new_markdown_cell(title), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / name)


def reasons(root):
    return {file.name: reason for file, reason, _ in export.compare(root)}


def illegal_imports(modules):
    """Of {module: source} in the order of the course, the pairs (module, import) that reach forward or by hand."""
    wrong, met = [], set()
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = ".".join(filter(None, ["minildm" if node.level else "", node.module]))
                names = [f"minildm.{alias.name}" for alias in node.names] if origin == "minildm" else [origin]
            else:
                continue
            names = [name for name in names if name.split(".")[0] == "minildm"]
            wrong += [(module, name) for name in names if name.removeprefix("minildm.") not in met]
        met.add(module)
    return wrong


@pytest.fixture
def course(tmp_path):
    """A copy of the notebooks and the package, in step."""
    for folder in ("notebooks", "minildm"):
        shutil.copytree(export.ROOT / folder, tmp_path / folder)
    export.export(tmp_path)
    return tmp_path


def test_package_is_the_export_of_the_notebooks():
    assert export.module_numbers()
    assert reasons(export.ROOT) == {}


def test_imports_follow_the_order_of_the_lessons():
    assert illegal_imports({module: source for module, (_, source) in export.collect().items()}) == []


@pytest.mark.parametrize(
    "line",
    [
        "import minildm",
        "import minildm.unet",
        "from minildm.unet import UNet",
        "from minildm import unet",
        "from .unet import UNet",
        "from . import unet",
        "def f():\n    from minildm.unet import UNet",
        "from minildm.bench import time",
    ],
)
def test_forward_imports_are_found(line):
    modules = {"data": "import torch", "viz": f"from minildm.data import load\n{line}", "unet": ""}
    assert [module for module, _ in illegal_imports(modules)] == ["viz"]


def test_edited_missing_and_orphaned_modules_are_caught_and_mended(course):
    first, second = list(export.module_numbers(course))[:2]
    edited, missing = (course / "minildm" / f"{name}.py" for name in (first, second))
    edited.write_text(edited.read_text(encoding="utf-8") + "\nx = 1\n", encoding="utf-8")
    missing.unlink()
    orphan = course / "minildm" / "orphan.py"
    orphan.write_text(export.HEADER.format("99_gone.ipynb"))
    assert reasons(course) == {
        edited.name: "differs from its notebook",
        missing.name: "is missing",
        "orphan.py": "is exported by no notebook",
    }
    export.export(course)
    assert reasons(course) == {}
    assert not orphan.exists()


def test_one_notebook_can_export_two_modules(tmp_path):
    make_notebook(
        tmp_path,
        "03_unet.ipynb",
        "#| default_exp unet",
        "#| export\nimport torch\n",
        "#| export losses\n#| doc What it minimises.\nimport math",
        "x = 1",
        "#| export\ndef f():\n    return 1",
        "#| export losses\ndef g():\n    return 2",
    )
    export.export(tmp_path)
    assert export.module_numbers(tmp_path) == {"unet": 3, "losses": 3}
    header = "# Exported from notebooks/03_unet.ipynb by tools/export.py: edit the notebook, not this file.\n"
    assert (tmp_path / "minildm" / "unet.py").read_text(encoding="utf-8") == (
        header + '"""Predicts the noise."""\n\nimport torch\n\n\ndef f():\n    return 1\n'
    )
    assert (tmp_path / "minildm" / "losses.py").read_text(encoding="utf-8") == (
        header + '"""What it minimises."""\n\nimport math\n\n\ndef g():\n    return 2\n'
    )
    assert (tmp_path / "minildm" / "__init__.py").exists()


@pytest.mark.parametrize(
    "cells, message",
    [
        (["#| export\nx = 1"], "no `#| default_exp`"),
        (["#| export losses\nx = 1"], "module losses needs a docstring"),
        (["#| exprot losses\nx = 1"], "`#| exprot losses` is not a known directive"),
        (["x = 1\n#| export losses"], "at the top of its cell"),
        (["#| default_exp __init__", "#| export\nx = 1"], "minildm/__init__.py is written by hand"),
    ],
)
def test_refuses_with_a_sentence(tmp_path, cells, message):
    make_notebook(tmp_path, "04_unet.ipynb", *cells)
    with pytest.raises(ValueError, match="notebooks/04_unet.ipynb: ") as error:
        export.export(tmp_path)
    assert message in str(error.value)


def test_a_module_belongs_to_one_notebook(tmp_path):
    for name in ("04_unet.ipynb", "05_more.ipynb"):
        make_notebook(tmp_path, name, "#| default_exp unet", "#| export\nx = 1")
    with pytest.raises(ValueError, match="module unet already belongs to 04_unet.ipynb"):
        export.export(tmp_path)
