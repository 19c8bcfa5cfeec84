"""Two small towers over one table of words, and the scale between them, as CLIP has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 128
# CLIP's: the scale begins at 1 / 0.07 and stays below 100.
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0


class Tower(nn.Module):
    """A weighted mean of the words, each weighted by what it says, then a small perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(WIDTH, 1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, words: Tensor) -> Tensor:
        """words (pairs, time, width) -> embeddings of length 1, (pairs, width)."""
        mean = (words * self.weight(words).softmax(1)).sum(1)
        return F.normalize(mean + self.mlp(mean), dim=-1)


class Towers(nn.Module):
    """The words before a place, and those after it, each by its own tower."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, WIDTH)
        self.before, self.after = Tower(), Tower()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (pairs, time) each -> both embeddings, and what their products are multiplied by."""
        with torch.no_grad():  # a clamp in the graph would end its gradient
            self.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        embeddings = self.before(self.words(before)), self.after(self.words(after))
        return *embeddings, self.logit_scale.exp()
