# Exported from notebooks/05_cross_attention.ipynb by tools/export.py: edit the notebook, not this file.
"""Prompts into tokens, tokens into context, and guidance by the prompt while sampling."""

import math
from collections.abc import Callable

import torch
from torch import nn

from minildm.data import DIGIT_NAMES
from minildm.unet import TransformerBlock


class PromptError(ValueError):
    """A prompt that cannot be used; the message says why and what can."""


CAPTION_WORDS = ("a", "an", "thin", "thick", "upright", "slanted", *DIGIT_NAMES, *"0123456789")


class Tokenizer:
    """Words to numbers: 0 pads, 1 starts every prompt (so that "" is not nothing), then the vocabulary in order."""

    def __init__(self, words: tuple[str, ...] = CAPTION_WORDS, max_words: int = 7):
        self.words, self.max_words = tuple(words), max_words
        self.ids = {word: i for i, word in enumerate(self.words, start=2)}

    def __len__(self) -> int:
        """The number of different tokens."""
        return len(self.words) + 2

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Prompts (B of them) → int64 (B, max_words + 1), each "start, words, padding"; case does not matter.

        Raises PromptError for an empty list, a word that is not in the vocabulary, or too many words.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise PromptError('give a list of at least one prompt, such as ["a thick slanted seven"].')
        rows = [self._encode_one(prompt) for prompt in prompts]
        length = self.max_words + 1
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def _encode_one(self, prompt: str) -> list[int]:
        words = prompt.lower().split()
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise PromptError(f'unknown word "{unknown[0]}" in "{prompt}": use only {", ".join(self.words)}.')
        if len(words) > self.max_words:
            raise PromptError(f'"{prompt}" has {len(words)} words: use at most {self.max_words}.')
        return [1, *(self.ids[word] for word in words)]


class TextEncoder(nn.Module):
    """τ_θ, a small transformer over the tokens of a prompt, trained together with the UNet (LDM section 3.3).

    Tokens (B, M) → context (B, M, dim) and mask (B, M), which is False at padding.
    """

    def __init__(self, vocabulary: int, dim: int = 128, depth: int = 2, heads: int = 4, length: int = 8):
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, None, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = tokens != 0
        x = self.token(tokens) + self.position[: tokens.shape[1]]  # (B, M, dim)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x), mask


class ClassEmbedding(nn.Module):
    """Class conditioning: one token for each label, one more (the last) for "no class". (B,) → context (B, 1, dim)."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding(labels)[:, None]


def guided(
    model: Callable,
    conditional: dict,
    unconditional: dict,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0, math.inf),
    guidance_rescale: float = 0.0,
) -> Callable:
    """Classifier-free guidance: a model(x, t) that returns uncond + w · (cond - uncond), w = guidance_scale.

    w = 1 is the conditional model itself, 0 the unconditional one, above 1 the prompt counts for more than it did in
    training (Ho & Salimans, 2022, whose w is this one less 1). `conditional` and `unconditional` are keyword arguments
    of the model, tensors with the batch first; both branches run in one batch.
    With `guidance_interval` = (low, high), steps outside of low ≤ t < high take the conditional model alone
    (Kynkäänniemi et al., 2024); t (B,) is then one step for the whole batch, as in sampling.
    With `guidance_rescale` = φ the guided prediction of each image is shrunk (or stretched) towards the standard
    deviation of its conditional one, not at all at 0 and to it at 1 (Lin et al., 2023, section 3.4).
    Raises ValueError unless w is a finite number of at least 0, 0 ≤ low < high and 0 ≤ φ ≤ 1.
    """
    low, high = guidance_interval
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be a number of at least 0, not {guidance_scale}.")
    if not 0 <= low < high:
        raise ValueError(
            f"guidance_interval must be two steps (low, high) with 0 ≤ low < high, not {guidance_interval}."
        )
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be between 0 and 1, not {guidance_rescale}.")
    both = {key: torch.cat([unconditional[key], conditional[key]]) for key in conditional}

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if guidance_scale == 1 or not low <= t[0] < high:
            return model(x, t, **conditional)
        if guidance_scale == 0:
            return model(x, t, **unconditional)
        uncond, cond = model(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        prediction = uncond + guidance_scale * (cond - uncond)
        if guidance_rescale == 0:
            return prediction
        before, after = (p.flatten(1).std(1).view(-1, *[1] * (p.ndim - 1)) for p in (cond, prediction))
        return prediction * (1 + guidance_rescale * (before / after.clamp(min=1e-8) - 1))

    return predict


def classifier_guided(model: Callable, log_prob: Callable, alpha_bar: Callable, guidance_scale: float) -> Callable:
    """Classifier guidance: an ε-model(x, t) pushed along the gradient of a classifier (Dhariwal & Nichol, algorithm 2).

    ε̂ = ε - w √(1-ᾱ_t) ∇_x log p(y | x_t), where `log_prob(x, t)` (B,) is a classifier trained on noisy images and
    `alpha_bar(t, x)` is ᾱ_t shaped to multiply x.
    """

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, t).sum(), leaf)
        return model(x, t) - guidance_scale * (1 - alpha_bar(t, x)).sqrt() * gradient

    return predict
