# Exported from notebooks/07_latent_diffusion.ipynb by tools/export.py: edit the notebook, not this file.
"""Muon, the optimiser of both stages: momentum whose singular values are all made about 1."""

import torch
from torch import nn

from minildm.training import EMA, TrainState

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's a, b, c


def quintic_factor(gram: torch.Tensor) -> torch.Tensor:
    """a I + b G + c G² of G = M Mᵀ (N, p, p): what makes f(S) of the singular values S when M is multiplied by it."""
    a, b, c = QUINTIC
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G G
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices U S Vᵀ (N, p, q) with p ≤ q → U f(f(f(f(f(S))))) Vᵀ, whose singular values are from 0.68 to 1.21.

    S is first divided by the norm of the matrix; what is below 0.0015 then stays smaller. f is the quintic
    f(s) = a s + b s³ + c s⁵ of Jordan et al. (2024). All of it is one factor on the left, a polynomial of M Mᵀ, so that
    only p × p matrices are iterated.
    """
    m = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = m @ m.mT
    factor = step = quintic_factor(gram)
    for _ in range(4):
        gram = step @ (step @ gram)  # polynomials of one matrix: their order does not matter
        step = quintic_factor(gram)
        factor = step @ factor
    return factor @ m


class Muon(torch.optim.Optimizer):
    """Muon for the weights of a model that are matrices or kernels, AdamW for its biases and norms.

    The gradients of a weight (out, …), averaged over steps with Nesterov's momentum, are read as a matrix (out, rest)
    and orthogonalised; the step is `lr` times that, √(out / rest) times longer for tall matrices (Jordan et al., 2024).
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95):
        matrices = {"params": [w for w in model.parameters() if w.ndim >= 2], "lr": lr, "momentum": momentum}
        vectors = {"params": [w for w in model.parameters() if w.ndim < 2]}
        self.adam = torch.optim.AdamW([vectors], lr, (0.9, 0.99), weight_decay=0, fused=True)
        super().__init__([matrices, *self.adam.param_groups], {})

    @torch.no_grad()
    def step(self) -> None:
        """Change all weights that have a gradient."""
        matrices, *self.adam.param_groups = self.param_groups  # load_state_dict makes new ones
        self.adam.state = self.state
        self.adam.step()
        by_shape: dict[torch.Size, list] = {}  # matrices of a shape are orthogonalised together
        for weight in matrices["params"]:
            if weight.grad is not None:
                matrix = self._ahead(weight, matrices["momentum"])
                by_shape.setdefault(matrix.shape, []).append((weight, matrix))
        for group in by_shape.values():
            directions = orthogonalise(torch.stack([matrix for _, matrix in group]))  # (N, p, q)
            for (weight, _), direction in zip(group, directions, strict=True):
                out, rest = weight.flatten(1).shape
                direction = direction.T if out > rest else direction  # (out, rest)
                length = matrices["lr"] * max(1.0, out / rest) ** 0.5
                channels_last = weight.movedim(1, -1)  # (out, …, in), the order of _ahead
                channels_last.sub_(direction.reshape(channels_last.shape), alpha=length)

    def _ahead(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        """Take in the gradient of a weight (out, …); Nesterov's average as a matrix (p, q) with p ≤ q."""
        if weight not in self.state:
            self.state[weight]["momentum"] = torch.zeros_like(weight)
        average = self.state[weight]["momentum"]
        average.lerp_(weight.grad, 1 - momentum)
        ahead = weight.grad.lerp(average, momentum).movedim(1, -1).flatten(1)  # (out, rest), as kernels lie in memory
        return ahead.T if ahead.shape[0] > ahead.shape[1] else ahead


def start_muon(model: nn.Module, lr: float, seed: int, ema_decay: float = 0.999, momentum: float = 0.95) -> TrainState:
    """`TrainState.start` with Muon in place of AdamW."""
    return TrainState(model, Muon(model, lr, momentum), EMA(model, ema_decay), torch.Generator().manual_seed(seed))
