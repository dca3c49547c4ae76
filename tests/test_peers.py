"""The comparison with diffusers: what it writes, that it measures what it says, and what it refuses."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from minildm.__main__ import main
from minildm.autoencoder import AutoencoderConfig
from minildm.data import data_root
from minildm.experiments import peers
from minildm.pipeline import LDMConfig
from minildm.unet import UNetConfig

SMALL = LDMConfig(
    AutoencoderConfig(3, 4, 4, (1, 2), attention=True, groups=2),
    UNetConfig(4, 4, 8, (1, 2), attention=(True, True), heads=2, context_dim=8, groups=4, ff_multiplier=2),
    image_size=16,
)
KEYS = ["part", "configuration", "what", "ours_ms", "diffusers_ms", "ratio", "ratio_low", "ratio_high"]
WORKS = [
    ("unet", "forward"),
    ("unet", "training step"),
    ("autoencoder", "forward"),
    ("autoencoder", "training step"),
    ("sampling", "20 steps"),
]


@pytest.fixture(scope="module", params=[1, 2])
def both(request):
    """The works of either library for a small setting, without and with patches."""
    setting = peers.mid_size(replace(SMALL, autoencoder=replace(SMALL.autoencoder, patch=request.param)), batch=2)
    unet, autoencoder = setting.model.second_stage.unet, setting.model.autoencoder
    twins = peers.diffusers_twin(unet), peers.diffusers_twin(autoencoder)
    return peers.works(unet, autoencoder, setting), peers.works(*twins, setting), unet, twins[0]


def test_the_command_writes_every_figure_and_keeps_what_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "SETTINGS", {"small": lambda: peers.mid_size(SMALL, batch=2)})
    monkeypatch.setattr(peers, "REPEATS", 3)
    out, work = tmp_path / "peers.json", tmp_path / "work"
    command = ["experiment", "peers", "--out", str(out), "--work", str(work)]
    assert main(command) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["part"], row["what"]) for row in rows] == WORKS
    for row in rows:
        assert list(row) == [*KEYS, "ours_mb", "diffusers_mb"]
        assert row["configuration"] == "small"
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    memory = {(row["part"], row["what"]): row["ours_mb"] for row in rows}
    assert memory["unet", "training step"] > memory["unet", "forward"]  # activations are kept for the gradients
    monkeypatch.setattr(peers, "measure", None)
    assert main(command) == 0


@pytest.mark.parametrize("work", WORKS)
def test_both_libraries_do_the_same_also_after_steps_of_training(both, work):
    ours, theirs = both[0][work], both[1][work]
    results = torch.stack([torch.stack([ours(), theirs()]).reshape(2, -1) for _ in range(4)])  # (4, 2, …)
    torch.testing.assert_close(results[:, 0], results[:, 1], rtol=1e-3, atol=1e-4)
    assert results[0].std() > 1e-3 or work[1] == "training step"
    assert (results[-1] < results[0]).all() == (work[1] == "training step")  # the loss falls; nothing else changes


def test_the_twin_has_as_many_parameters_and_the_mask_counts(both):
    unet, twin = both[2:]
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in twin.parameters())
    setting = peers.mid_size(SMALL, batch=2)
    inputs = setting.latents, torch.tensor([0, 500]), setting.context[:2]
    for model in (unet, twin):
        outputs = [peers.predict(model, *inputs, mask[:2]) for mask in (setting.mask, torch.ones_like(setting.mask))]
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_times_are_taken_in_turns_and_ratios_are_those_of_neighbours(monkeypatch):
    seconds, calls = iter([1.0, 2.0, 2.0, 4.0, 9.0, 3.0]), []
    monkeypatch.setattr(peers, "stopwatch", lambda run: (run(), next(seconds))[1])
    ours, theirs = (lambda name=name: calls.append(name) or torch.ones(3) for name in "AB")
    found = peers.compare(ours, theirs, 3)
    assert "".join(calls[2:-2]) == "ABABAB"
    assert (found["ours_ms"], found["diffusers_ms"], found["ratio"]) == (2000, 3000, 0.5)
    assert (found["ratio_low"], found["ratio_high"]) == (0.5, 3)


def test_memory_is_what_tensors_hold_at_once():
    assert peers.peak_megabytes(lambda: [torch.ones(1_000_000), torch.ones(500_000)]) == pytest.approx(6, abs=0.01)
    assert peers.peak_megabytes(lambda: [torch.ones(1_000_000).sum() for _ in range(3)]) == pytest.approx(4, abs=0.01)


def test_models_that_disagree_are_not_timed():
    with pytest.raises(ValueError, match="disagree by up to 0.01"):
        peers.compare(lambda: torch.ones(2), lambda: torch.tensor([1.0, 1.01]), 3)
    with pytest.raises(ValueError, match="disagree"):
        peers.compare(lambda: torch.tensor(float("nan")), lambda: torch.tensor(1.0), 3)


def test_without_diffusers_one_sentence_says_what_to_install(monkeypatch, refused, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert 'pip install -e ".[test]"' in refused("experiment", "peers", "--work", tmp_path, "--out", tmp_path / "x")


def test_minildm_was_not_slower_and_took_no_more_memory():
    rows = json.loads((data_root() / "results" / "peers.json").read_text())["rows"]
    assert {row["configuration"] for row in rows} == set(peers.SETTINGS)
    assert [f"{row['configuration']}: {row['part']}, {row['what']}" for row in rows if row["ratio_low"] > 1] == []
    assert max(row["ours_mb"] / row["diffusers_mb"] for row in rows) < 1.01
