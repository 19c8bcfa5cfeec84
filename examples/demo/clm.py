"""Causal language model: a small GPT, each token predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn
from torch.nn import functional as F

import neglog

from .gpt import CONTEXT, GPT
from .task import Features, Say, Task
from .text import load as load_text
from .text import windows

BATCH = 16
QUICK_HELD_OUT = 4097
PROMPT = "The"


def torch_loss(features: Features, ids: Tensor) -> Tensor:
    """Logits in memory; the labels are moved, not the logits, as Transformers does it."""
    hidden, head = features
    target = F.pad(ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(F.linear(hidden, head).flatten(0, 1), target.flatten())


def neglog_loss(features: Features, ids: Tensor) -> Tensor:
    """The same without the logits."""
    hidden, head = features
    return neglog.linear_cross_entropy(hidden, head, ids, shift=True)


class CausalLM(Task):
    """Batches are windows of token ids."""

    title = "A small GPT, trained twice: only the loss function differs"
    steps = 200
    rate = 2e-3
    losses = {"torch": torch_loss, "neglog": neglog_loss}  # noqa: RUF012

    def __init__(self, quick: bool) -> None:
        self.data = load_text()
        if quick:
            self.data = self.data._replace(held_out=self.data.held_out[:QUICK_HELD_OUT])

    def describe(self) -> str:
        """Tokens to train on, tokens held out, vocabulary."""
        return (
            f"Python's own documentation, {len(self.data.train):,} tokens to train on, "
            f"{len(self.data.held_out):,} held out, vocabulary {len(self.data.tokenizer):,}"
        )

    def shape(self) -> str:
        """The next token out of the vocabulary."""
        return f"next token, vocabulary {len(self.data.tokenizer):,}"

    def model(self) -> GPT:
        """A GPT of 2 layers."""
        return GPT(len(self.data.tokenizer))

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Random windows (batch, context)."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield windows(self.data.train, CONTEXT, BATCH, generator)

    def features(self, model: nn.Module, batch: Any) -> Features:
        """Hidden states, and the embedding that is the head too."""
        assert isinstance(model, GPT)
        return model.hidden(batch), model.token.weight

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """exp of the mean loss per held-out token."""
        tokens = self.data.held_out
        length = (len(tokens) - 1) // CONTEXT * CONTEXT
        ids = tokens[:length].view(-1, CONTEXT)
        target = tokens[1 : length + 1].view(-1, CONTEXT)
        total = 0.0
        for some, wanted in zip(ids.split(BATCH), target.split(BATCH), strict=True):
            logits = model(some).flatten(0, 1)
            total += F.cross_entropy(logits, wanted.flatten(), reduction="sum").item()
        return math.exp(total / length)

    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """The model continues a word."""
        assert isinstance(model, GPT)
        generator = torch.Generator().manual_seed(seed)
        ids = model.generate(self.data.tokenizer.encode(PROMPT), 30, generator)
        line = " ".join(self.data.tokenizer.decode(ids).split())
        say(f"The model writes: [italic]{escape(line)}[/]")


def load(quick: bool) -> Task:
    """The task, its text read."""
    return CausalLM(quick)
