# Exported from notebooks/01_vae_vs_diffusion.ipynb by tools/export.py: edit the notebook, not this file.
"""The training loop as a generator, the moving average of the weights, and checkpoints that survive a kill."""

import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minildm.data import DataError, write_atomically


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of `steps`, or `seconds` of wall clock, whichever is given."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give a budget in steps or in seconds, and not in both.")
        amount = self.seconds if self.steps is None else self.steps
        if not amount > 0:  # `not >` also catches NaN
            raise ValueError(f"a training budget must be positive, not {amount}.")

    def share(self, share: float) -> "Budget":
        """A part of this budget, at least one step."""
        if self.steps:
            return Budget(steps=max(1, round(share * self.steps)))
        return Budget(seconds=share * self.seconds)

    def progress(self, step: int, elapsed: float) -> float:
        """The fraction used after `step` steps and `elapsed` seconds; 1 or more means that it is spent."""
        return step / self.steps if self.steps else elapsed / self.seconds


def warmup_cosine(progress: float, warmup: float = 0.05) -> float:
    """Factor on the peak learning rate: up a line over the share `warmup` of the budget, then half a cosine to 0."""
    if progress < warmup:
        return (progress + 0.001) / (warmup + 0.001)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class EMA:
    """An exponential moving average of a model's weights, with a warm-up.

    After step n the average is `decay_n · average + (1 - decay_n) · weights` with decay_n = min(decay, (1+n)/(10+n)):
    without the warm-up the random first weights would keep a share of decay**n, which a short run never forgets.
    `model` is the averaged copy, in eval mode and without gradients.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.model, self.decay, self.step = deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` after an optimiser step."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        averages, weights = (
            [v for v in (*m.parameters(), *m.buffers()) if v.is_floating_point()] for m in (self.model, model)
        )
        torch._foreach_lerp_(averages, weights, 1 - decay)  # all of them in one call


@dataclass
class TrainState:
    """All that training changes, so that a checkpoint of it continues bit-exactly."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    ema: EMA
    generator: torch.Generator
    step: int = 0
    elapsed: float = 0.0
    loss: float = math.nan
    history: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, lr: float, seed: int, weight_decay: float = 0.0, ema_decay: float = 0.999):
        """A fresh state: AdamW with β = (0.9, 0.99), EMA, and a generator from `seed` on the CPU."""
        optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        return cls(model, optimiser, EMA(model, ema_decay), torch.Generator().manual_seed(seed))


def train(state: TrainState, loss_fn: Callable, budget: Budget, lr: float, clip: float = 1.0) -> Iterator[TrainState]:
    """Train and yield the state after every step, so that the caller owns printing, plots and checkpoints.

    `loss_fn(model, generator)` draws its own batch from the generator and returns a scalar. Stops when `budget` is
    spent. Gradients are clipped to the norm `clip`. Raises FloatingPointError when the loss is not finite.
    """
    start = time.perf_counter() - state.elapsed
    while (progress := budget.progress(state.step, state.elapsed)) < 1:
        for group in state.optimiser.param_groups:
            group["lr"] = lr * warmup_cosine(progress)
        state.model.train()
        loss = loss_fn(state.model, state.generator)
        if not torch.isfinite(loss):  # before it reaches the weights
            raise FloatingPointError(f"the loss is {loss.item()} at step {state.step + 1}: lower the learning rate.")
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        state.optimiser.step()
        state.ema.update(state.model)
        state.step, state.loss, state.elapsed = state.step + 1, loss.item(), time.perf_counter() - start
        state.history.append(state.loss)
        yield state


def progress_line(name: str, state: TrainState, budget: Budget, recent: int = 50) -> str:
    """One line on how a stage stands: share done, steps, time left, mean loss of the recent steps."""
    done = min(budget.progress(state.step, state.elapsed), 1.0)
    left = state.elapsed * (1 - done) / max(done, 1e-9)
    loss = sum(state.history[-recent:]) / max(len(state.history[-recent:]), 1)
    return f"{name}  {done:4.0%}  step {state.step}  {left:4.0f} s left  loss {loss:.4f}"


def batch_indices(n: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """`batch_size` indices in [0, n), drawn with replacement, int64 (batch_size,)."""
    return torch.randint(n, (batch_size,), generator=generator)


def save_checkpoint(state: TrainState, path: Path | str, **info) -> None:
    """Write the whole state to one safetensors file, atomically; `info` is what `load_checkpoint` gives back."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}
    moments = state.optimiser.state_dict()["state"]
    tensors |= {f"optimiser.{i}.{k}": v for i, slots in moments.items() for k, v in slots.items()}
    tensors |= {"generator": state.generator.get_state(), "history": torch.tensor(state.history, dtype=torch.float64)}
    numbers = {"step": state.step, "elapsed": state.elapsed, "ema_step": state.ema.step, "info": info}
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    write_atomically(Path(path), lambda file: save_file(tensors, file, {"state": json.dumps(numbers)}))


def load_checkpoint(state: TrainState, path: Path | str) -> dict:
    """Put a checkpoint into a state made the same way; returns the `info` that was saved with it.

    Raises DataError when the file is missing, damaged, or from another model.
    """
    tensors, metadata = read_safetensors(path)
    if "state" not in metadata:
        raise DataError(f"{path} holds no checkpoint: give a file that save_checkpoint wrote.")
    numbers = json.loads(metadata["state"])

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    load_weights(state.model, part("model."), path)
    load_weights(state.ema.model, part("ema."), path)
    optimiser = state.optimiser.state_dict()
    parameters = [weight for group in state.optimiser.param_groups for weight in group["params"]]
    for key, value in part("optimiser.").items():
        index, slot = int(key.split(".")[0]), key.split(".")[1]
        if value.shape == parameters[index].shape:  # the fused optimiser wants its moments laid out as the weights are
            value = torch.empty_like(parameters[index]).copy_(value)
        else:
            value = value.clone()  # what is a view of the file would keep it from being replaced on Windows
        optimiser["state"].setdefault(index, {})[slot] = value
    state.optimiser.load_state_dict(optimiser)
    state.generator.set_state(tensors["generator"])
    state.history = tensors["history"].tolist()
    state.step, state.elapsed, state.ema.step = numbers["step"], numbers["elapsed"], numbers["ema_step"]
    state.loss = state.history[-1] if state.history else math.nan
    return numbers["info"]


def read_safetensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises DataError when it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise DataError(f"{path} is missing: train first, or give another folder.") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}): restore it or train again.") from None


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    """Copy weights into a model. Raises DataError that names missing, extra or misshapen keys."""
    own = model.state_dict()
    wrong = [f"{k} missing" for k in own.keys() - weights.keys()] + [f"{k} extra" for k in weights.keys() - own.keys()]
    wrong += [
        f"{k} has shape {tuple(weights[k].shape)} for {tuple(v.shape)}"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if wrong:
        listed = "; ".join(sorted(wrong)[:5])
        raise DataError(f"{path} does not fit the model ({len(wrong)} keys: {listed}): it belongs to another model.")
    model.load_state_dict(weights)
