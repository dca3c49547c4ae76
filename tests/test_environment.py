"""pip, conda and the pinned versions install the same thing."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = {*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)}
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LINES = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}


def test_constraints_are_exact_versions_that_every_machine_can_install():
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []  # no range, no +cpu, no address


def test_every_pinned_release_runs_on_the_oldest_python_that_the_project_allows():
    oldest = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])[1] + ".0"
    installed = {
        canonicalize_name(d.metadata["Name"]): d.metadata.get("Requires-Python") or "" for d in distributions()
    }
    needs = {name: need for name, need in installed.items() if name in PINS}
    assert len(needs) > 50
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(oldest)} == {}


@pytest.mark.parametrize("line", sorted(DIRECT))
def test_every_direct_dependency_is_pinned_within_its_range(line):
    requirement = Requirement(line)
    assert requirement.specifier, "a dependency is a range"
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_conda_installs_the_project_and_holds_no_versions_of_its_own():
    python, pip, from_pip = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert pip == "pip"
    assert from_pip == {"pip": ["-c constraints.txt", "-e .[lab,test]"]}
    version = re.fullmatch(r"python=(\d+\.\d+)", python)[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)


def test_the_makefile_installs_what_conda_installs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--constraint constraints.txt" in makefile
    assert "--editable '.[lab,test]'" in makefile
