"""The numbers of the README are those of the JSON files that the commands wrote, at the precision printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(path: str) -> dict:
    """A JSON file in data/, or nothing where the file is not there."""
    file = ROOT / "data" / path
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


METRICS, CARD = read("weights/mnist-text/metrics.json"), read("weights/mnist-text/card.json")
JUDGE, FIVE = read("weights/mnist-classifier/card.json"), read("results/cards/mnist-text-5-minutes.json")

ROWS = {  # the label of each row, and the name of the number before each unit in its cells
    "trained for": {"steps": "trained_steps", "min": "minutes"},
    "read as the digit asked for": {"%": "prompt_accuracy"},
    "drawn as thick or thin as asked": {"%": "thickness_accuracy"},
    "drawn as slanted or upright as asked": {"%": "slant_accuracy"},
    "Fréchet distance in the judge's features, 10,000 against the 10,000 test images": {"": "frechet_distance_10000"},
    "precision in the same features": {"": "precision"},
    "recall": {"": "recall"},
    "suspiciously close to one training image (1 % of unseen digits are)": {"%": "memorised"},
    "PSNR of the autoencoder on the test images": {"dB": "psnr"},
}
COLUMNS = {
    "shipped weights": METRICS | {"trained_steps": sum(CARD["steps"]), "minutes": sum(CARD["seconds"]) / 60},
    "5 minutes": FIVE["metrics"]
    | {"trained_steps": sum(FIVE["steps"]), "minutes": float(FIVE["command"].partition("--minutes ")[2])},
    "real digits": {
        "prompt_accuracy": JUDGE["test_accuracy"],
        "frechet_distance_10000": METRICS["real_frechet_distance_10000"],
    },
}


def cells(corner: str = "", heading: str = "Measured") -> list[tuple[str, str, str]]:
    """(label, column, cell) for each filled cell of the table under a heading whose first cell is `corner`."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for table in re.findall(r"(?:^\|.*\|\n)+", section, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if header[0] == corner:
            pairs = [(row[0], column, cell) for row in rows for column, cell in zip(header[1:], row[1:], strict=True)]
            return [pair for pair in pairs if pair[2]]
    raise AssertionError(f'README has no table with "{corner}" in its corner.')


def expected(label: str, column: str, cell: str) -> str:
    """The cell with its numbers replaced by those measured, at the precision printed."""

    def measured(found: re.Match) -> str:
        number, unit = found.groups()
        value = COLUMNS[column][ROWS[label][unit.strip()]] * (100 if unit == " %" else 1)
        return f"{value:,.{len(number.partition('.')[2])}f}{unit}"

    return re.sub(r"(\d[\d,]*(?:\.\d+)?)( %| dB| steps| min|)", measured, cell)


@pytest.mark.parametrize(("label", "column", "cell"), cells())
def test_each_number_in_the_table_was_measured(label, column, cell):
    assert expected(label, column, cell) == cell


def test_the_paragraph_on_guidance_is_what_the_experiment_measured():
    guidance = read("results/guidance.json")
    rows = {row["guidance_scale"]: row for row in guidance["rows"]}
    scale = METRICS["guidance_scale"]
    rescaled = {row["guidance_scale"]: row for row in guidance["rescaled_rows"]}[scale]
    text = " ".join(README.split())
    for name, row in (("without it (w = 1)", rows[1.0]), ("in every step (w = 1.25)", rows[1.25])):
        missed = round((1 - row["accuracy"]) * row["samples"])
        assert re.search(rf"{re.escape(name)} {missed}\b[^;]* {row['frechet_distance']:.2f};", text)
    missed = round((1 - rescaled["accuracy"]) * rescaled["samples"])
    figures = f"(w = {scale:g}) {missed} and {rescaled['frechet_distance']:.2f}"
    assert f"in the steps at t < 500 alone and rescaled {figures}." in text
    assert f"of {guidance['rows'][0]['samples']:,} drawings without it" in text
    real = guidance["real"]["frechet_distance"]
    assert f"{guidance['rows'][0]['samples']:,} real training digits stand at {real:.1f}," in text


def test_every_row_of_the_table_is_there():
    assert [label for label, column, _ in cells() if column == "shipped weights"] == list(ROWS)


def test_the_settings_and_the_judge_named_above_the_table_are_those_measured_with():
    assert CARD["metrics"] == METRICS
    assert METRICS["samples"] == FIVE["metrics"]["samples"] == 10_000
    assert FIVE["metrics"]["sampler"] == METRICS["sampler"] == "dpm++"
    text = " ".join(README.split())
    for name in ("steps", "guidance_scale", "guidance_interval", "guidance_rescale"):
        assert FIVE["metrics"][name] == METRICS[name]
    (low, high), scale, steps = (METRICS[name] for name in ("guidance_interval", "guidance_scale", "steps"))
    assert METRICS["guidance_rescale"] == 1 and low == 0
    assert f"in {steps} steps, guided at t < {high:g} with w = {scale:g} and rescaled" in text
    options = f"--sampler dpm++ --steps {steps} --guidance-scale {scale:g} --guidance-interval 0 {high:g}"
    assert f"(`python -m minildm evaluate mnist-text {options} --guidance-rescale 1`)" in text
    for name in ("first", "one-core"):
        card = read(f"results/cards/mnist-text-5-minutes-{name}.json")
        assert card["configuration"] == FIVE["configuration"] and card["command"] == FIVE["command"]
        setting = "steps", "guidance_scale", "guidance_interval", "guidance_rescale", "sampler", "samples"
        assert all(card["metrics"][key] == FIVE["metrics"][key] for key in setting)
        figures = "{:.1f} % and {frechet_distance_10000:.2f}".format(
            100 * card["metrics"]["prompt_accuracy"], **card["metrics"]
        )
        assert re.search(rf"{figures} \(\[[a-z ]*\]\([^)]*-{name}\.json\)", text)
    assert f"({100 * JUDGE['test_accuracy']:.1f} % on the test set)" in README


@pytest.mark.parametrize("cell", sorted({cell for _, _, cell in cells()}))
def test_an_altered_number_would_be_found(cell):
    label, column, _ = next(found for found in cells() if found[2] == cell)
    for position in [match.start() for match in re.finditer(r"\d", cell)]:
        altered = cell[:position] + str((int(cell[position]) + 1) % 10) + cell[position + 1 :]
        assert expected(label, column, altered) != altered


def test_the_ratios_to_diffusers_are_those_measured():
    measured = {}
    for row in read("results/peers.json")["rows"]:
        label = f"{row['part'].replace('unet', 'UNet')}, {row['what']}"
        time = "{ratio:.2f} ({ratio_low:.2f}–{ratio_high:.2f})".format(**row)
        measured[label, f"{row['configuration']}: time"] = time
        measured[label, f"{row['configuration']}: memory"] = f"{row['ours_mb'] / row['diffusers_mb']:.2f}"
    assert {(label, column): cell for label, column, cell in cells("minildm / diffusers")} == measured


def solutions(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells of a lesson that solve an exercise."""
    return [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]


def test_the_exercises_and_the_hours_of_the_course_are_counted_right():
    counts = [len(solutions(nbformat.read(path, 4))) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    text = " ".join(README.split())
    assert f"three to five exercises, {sum(counts)} in all" in text
    assert (min(counts), max(counts)) == (3, 5)
    minutes = {
        row: int(cell.split()[0]) for row, column, cell in cells("lesson", "The course") if column == "to work through"
    }
    assert f"about {round(sum(minutes.values()) / 60)} hours of work" in text
    short = sum(minutes[name] for name in minutes if name[1:3] in ("01", "02", "07"))
    assert f"01, 02 and 07 alone, about {round(short / 60)} hours" in text


def test_the_copies_for_a_class_lack_the_solutions_and_nothing_else(tmp_path):
    command = next(line for line in README.splitlines() if "remove_cell_tags=solution" in line)
    changed = {"handout": str(tmp_path), "notebooks/*.ipynb": "notebooks/02_forward_process.ipynb"}
    words = [changed.get(word, word) for word in shlex.split(command)]
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=ROOT)
    lesson, copy = (nbformat.read(folder / "02_forward_process.ipynb", 4) for folder in (ROOT / "notebooks", tmp_path))
    assert [cell.source for cell in copy.cells] == [c.source for c in lesson.cells if c not in solutions(lesson)]
    assert len(copy.cells) < len(lesson.cells)


def test_the_command_for_marking_counts_the_checks_that_passed():
    (command,) = (line for line in README.splitlines() if "grep -cE" in line)
    pattern = re.compile(shlex.split(command)[-1])
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):  # as committed: attempts unsolved, solutions solved
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
        assert len(lines) == len(solutions(nbformat.read(path, 4))), path.name
