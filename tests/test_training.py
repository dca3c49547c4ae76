"""The training loop, the moving average, and checkpoints that continue bit-exactly."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from minildm.autoencoder import AutoencoderKL
from minildm.data import DataError, seeded
from minildm.judge import DigitClassifier, classifier_loss
from minildm.losses import first_stage_loss_fn
from minildm.pipeline import LatentDiffusion, second_stage_loss_fn
from minildm.training import (
    EMA,
    Budget,
    TrainState,
    batch_indices,
    load_checkpoint,
    progress_line,
    save_checkpoint,
    train,
    warmup_cosine,
)


def line_state(lr: float = 0.1, seed: int = 0) -> TrainState:
    """A model of one weight vector (1, 3)."""
    torch.manual_seed(seed)
    return TrainState.start(nn.Linear(3, 1, bias=False), lr, seed)


def line_loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Distance from the rule y = x1 + x2 + x3."""
    x = torch.randn(16, 3, generator=generator)
    return ((model(x)[:, 0] - x.sum(1)) ** 2).mean()


def run(state: TrainState, loss_fn=line_loss, steps: int = 5, lr: float = 0.1, **options) -> TrainState:
    for _ in train(state, loss_fn, Budget(steps=steps), lr, **options):
        pass
    return state


# budgets and the learning rate


@pytest.mark.parametrize(
    "values, says",
    [
        ({}, "in steps or in seconds"),
        ({"steps": 3, "seconds": 3.0}, "not in both"),
        ({"steps": 0}, "must be positive, not 0"),
        ({"steps": -1}, "must be positive, not -1"),
        ({"seconds": 0.0}, "must be positive, not 0"),
        ({"seconds": math.nan}, "must be positive, not nan"),
    ],
)
def test_impossible_budgets_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Budget(**values)


@given(steps=st.integers(1, 10**6), share=st.floats(0, 1))
def test_a_share_of_a_budget_in_steps_is_whole_and_at_least_one(steps, share):
    part = Budget(steps=steps).share(share).steps
    assert part == max(1, round(steps * share))
    assert Budget(seconds=8.0).share(0.25) == Budget(seconds=2.0)


def test_a_budget_in_seconds_ends_the_training():
    state = line_state()
    for _ in train(state, line_loss, Budget(seconds=0.2), 0.1):
        assert state.elapsed < 5
    assert state.elapsed >= 0.2 and state.step == len(state.history) > 1


@given(progress=st.floats(0, 2), warmup=st.floats(0.01, 0.5))
def test_learning_rate_rises_on_a_line_then_falls_on_half_a_cosine(progress, warmup):
    factor = warmup_cosine(progress, warmup)
    if progress < warmup:
        assert factor == pytest.approx(progress / warmup, abs=0.1)
        assert 0 < factor <= 1
    else:
        past = min((progress - warmup) / (1 - warmup), 1)
        assert factor == pytest.approx(math.cos(math.pi / 2 * past) ** 2, abs=1e-9)  # (1 + cos 2a) / 2 = cos² a


def test_the_optimiser_gets_the_scheduled_learning_rate():
    state, used = line_state(), []
    for _ in train(state, line_loss, Budget(steps=4), 0.1):
        used.append(state.optimiser.param_groups[0]["lr"])
    assert used == [0.1 * warmup_cosine(step / 4) for step in range(4)]


# the loop


def test_training_finds_the_rule():
    state = run(line_state(), steps=400)
    torch.testing.assert_close(state.model.weight, torch.ones(1, 3), rtol=0, atol=0.02)
    assert state.history[-1] < state.history[0] / 100


def test_gradients_are_clipped_to_the_given_norm():
    state = line_state()
    before = state.model.weight.detach().clone()
    state.optimiser = torch.optim.SGD(state.model.parameters(), 1.0)  # moves by lr · gradient
    run(state, lambda model, _: 1000 * model.weight.sum(), steps=1, lr=10.0, clip=0.5)
    expected = 10 * warmup_cosine(0.0) * 0.5
    assert (state.model.weight - before).norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(FloatingPointError, match="at step 1: lower the learning rate"):
        run(line_state(), lambda model, _: model.weight.sum() * math.nan)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    state = line_state()
    before = state.model.weight.detach().clone()
    with pytest.raises(FloatingPointError):
        run(state, lambda model, _: model.weight.sum() * math.inf)
    assert torch.equal(state.model.weight, before) and torch.equal(state.ema.model.weight, before) and state.step == 0


def test_same_seed_same_training():
    first, second, other = run(line_state(seed=1)), run(line_state(seed=1)), run(line_state(seed=2))
    assert first.history == second.history != other.history
    assert torch.equal(first.model.weight, second.model.weight)


def test_batches_cover_the_data_evenly():
    counts = batch_indices(10, 20_000, seeded(0)).bincount()
    assert len(counts) == 10 and (counts - 2000).abs().max() < 200


def test_progress_line_says_how_far_and_how_long():
    state = line_state()
    state.step, state.elapsed, state.history = 25, 10.0, [9.0] * 10 + [0.5] * 50
    assert progress_line("stage", state, Budget(steps=100)) == "stage   25%  step 25    30 s left  loss 0.5000"


# the moving average


def averaged(values: list[float], decay: float) -> float:
    """EMA's weight after the model's weight went through the values."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, values[0])
    ema = EMA(model, decay)
    for value in values[1:]:
        nn.init.constant_(model.weight, value)
        ema.update(model)
    return ema.model.weight.item()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0.1, 0.999))
def test_ema_is_the_weighted_sum_with_warm_up(values, decay):
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(values))]
    shares = [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    expected = values[0] * math.prod(decays) + sum(s * v for s, v in zip(shares, values[1:], strict=True))
    assert averaged(values, decay) == pytest.approx(expected, abs=1e-4)


def test_ema_forgets_the_start_in_a_short_run():
    assert averaged([100.0] + [0.0] * 50, 0.999) < 0.01  # 0.999^50 of 100 would be 95


def test_ema_model_is_a_frozen_copy():
    model = nn.Linear(2, 2)
    ema = EMA(model)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    nn.init.zeros_(model.weight)
    assert ema.model.weight.any()


# checkpoints


def first_stage(data):
    autoencoder = AutoencoderKL(tiny.CONFIG.autoencoder).to(memory_format=torch.channels_last)
    return autoencoder, first_stage_loss_fn(data.x_train, 4)


def second_stage(data):
    whole = LatentDiffusion(tiny.CONFIG)
    latents = torch.randn(30, 4, 8, 8, generator=seeded(1))
    return whole.second_stage.requires_grad_(True), second_stage_loss_fn(whole, latents, ["a thin seven"] * 30, 4)


def classifier(data):
    return DigitClassifier(8, 16), classifier_loss(data.x_train, data.y_train, 4)


def all_of(state: TrainState) -> dict:
    """Everything that a checkpoint must bring back."""
    moments = {
        (i, slot): value for i, slots in state.optimiser.state_dict()["state"].items() for slot, value in slots.items()
    }
    weights = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    averages = {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}
    return {**moments, **weights, **averages, "generator": state.generator.get_state()}


@pytest.mark.parametrize("stage", [first_stage, second_stage, classifier])
def test_resuming_is_bit_exact(stage, tmp_path):
    def start():
        torch.manual_seed(3)
        model, loss_fn = stage(tiny.small_mnist())
        return TrainState.start(model, 1e-3, seed=3, weight_decay=0.01), loss_fn

    budget = Budget(steps=12)
    whole, loss_fn = start()
    for _ in train(whole, loss_fn, budget, 1e-3):
        pass

    torn, loss_fn = start()
    for _ in train(torn, loss_fn, budget, 1e-3):
        if torn.step == 6:
            break
    save_checkpoint(torn, tmp_path / "checkpoint", note="half")
    resumed, loss_fn = start()
    torch.manual_seed(99)  # a new process has another global state
    torch.rand(7)
    assert load_checkpoint(resumed, tmp_path / "checkpoint") == {"note": "half"}
    assert (resumed.step, resumed.elapsed, resumed.loss) == (6, torn.elapsed, torn.history[-1])
    for _ in train(resumed, loss_fn, budget, 1e-3):
        pass

    assert resumed.history == whole.history and len(whole.history) == resumed.step == 12
    assert resumed.ema.step == whole.ema.step == 12
    ours, theirs = all_of(resumed), all_of(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_a_checkpoint_before_the_first_step_can_be_loaded(tmp_path):
    save_checkpoint(line_state(), tmp_path / "checkpoint")
    state = line_state(seed=1)
    load_checkpoint(state, tmp_path / "checkpoint")
    assert run(state).history == run(line_state()).history


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped")
def test_a_loaded_checkpoint_is_not_held_open(tmp_path):
    state = run(line_state())
    save_checkpoint(state, tmp_path / "checkpoint.mapped")
    load_checkpoint(state, tmp_path / "checkpoint.mapped")
    assert "checkpoint.mapped" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "is missing: train first"),
        (b"", "is damaged"),
        ("truncated", "is damaged"),
        ("another model", "belongs to another model"),
        ("only weights", "holds no checkpoint"),
    ],
)
def test_bad_checkpoints_are_refused(tmp_path, content, says):
    path = tmp_path / "checkpoint"
    if content == "truncated":
        save_checkpoint(line_state(), path)
        path.write_bytes(path.read_bytes()[:-10])
    elif content == "another model":
        save_checkpoint(TrainState.start(nn.Linear(4, 1), 0.1, 0), path)
    elif content == "only weights":
        save_file(line_state().model.state_dict(), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        load_checkpoint(line_state(), path)
    assert str(path) in str(error.value)


def test_a_misfit_names_the_wrong_weights(tmp_path):
    save_checkpoint(TrainState.start(nn.Linear(4, 1), 0.1, 0), tmp_path / "checkpoint")
    with pytest.raises(DataError, match=r"2 keys: bias extra; weight has shape \(1, 4\) for \(1, 3\)"):
        load_checkpoint(line_state(), tmp_path / "checkpoint")


def test_a_checkpoint_holds_plain_tensors_and_json(tmp_path):
    save_checkpoint(run(line_state()), tmp_path / "checkpoint", epoch=3)
    length = int.from_bytes((tmp_path / "checkpoint").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "checkpoint").read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["state"])["info"] == {"epoch": 3}
    assert {"model.weight", "ema.weight", "generator", "history"} < header.keys()
