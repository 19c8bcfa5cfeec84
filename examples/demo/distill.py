"""Distillation: a small GPT learns from a larger one, of whose distributions it is told the top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neglog

from . import QUICK_STEPS
from .clm import BATCH, CausalLM
from .gpt import CONTEXT, GPT
from .task import Features, Say, Task
from .text import windows

TEACHER_STEPS = 150
TEACHER = {"width": 256, "layers": 3, "heads": 8}
NAMED = 64  # classes of each position
HARD_WEIGHT = 0.3
# Token ids (batch, context), and of each position the teacher's first classes and their log p.
Lesson = tuple[Tensor, Tensor, Tensor]


def torch_loss(features: Features, lesson: Lesson) -> Tensor:
    """Logits in memory. The classes that the teacher does not name are one bin."""
    hidden, head = features
    ids, named, teacher = lesson
    log_p = F.linear(hidden, head)[:, :-1].log_softmax(-1)  # the last has no next token
    named, teacher = named[:, :-1], teacher[:, :-1]
    others = log_p.scatter(-1, named, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat([log_p.gather(-1, named), others], -1)
    rest = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    teacher = torch.cat([teacher, rest], -1)
    soft = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
    hard = F.nll_loss(log_p.flatten(0, 1), ids[:, 1:].flatten())
    return soft + HARD_WEIGHT * hard


def neglog_loss(features: Features, lesson: Lesson) -> Tensor:
    """The same without the logits."""
    hidden, head = features
    ids, named, teacher = lesson
    return neglog.linear_kl_div_loss(
        hidden, head, teacher, ids, teacher_ids=named, hard_weight=HARD_WEIGHT, shift=True
    )


class Distillation(CausalLM):
    """Batches are windows of token ids, and what the teacher says of them."""

    title = "A small GPT, taught twice by a larger one: only the loss function differs"
    steps = 150
    losses = {"torch": torch_loss, "neglog": neglog_loss}  # noqa: RUF012

    def __init__(self, quick: bool) -> None:
        super().__init__(quick)
        self.teacher = self._trained(QUICK_STEPS if quick else TEACHER_STEPS)
        self.perplexity = self.score(self.teacher)

    def _trained(self, steps: int) -> GPT:
        """A larger GPT, by maximum likelihood."""
        torch.manual_seed(0)
        model = GPT(len(self.data.tokenizer), **TEACHER)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            ids = windows(self.data.train, CONTEXT, BATCH, generator)
            optimizer.zero_grad()
            neglog.linear_cross_entropy(
                model.hidden(ids), model.token.weight, ids, shift=True
            ).backward()
            optimizer.step()
        return model.eval()

    def describe(self) -> str:
        """The text, and the teacher."""
        return (
            f"{super().describe()}; the teacher, of {TEACHER['layers']} layers of "
            f"{TEACHER['width']}, has a held-out perplexity of {self.perplexity:,.2f}"
        )

    def shape(self) -> str:
        """What the teacher names out of the vocabulary."""
        return f"{NAMED} classes of each position out of {len(self.data.tokenizer):,}, and the rest"

    def batches(self, seed: int) -> Iterator[Any]:
        """Random windows, each with the teacher's first classes."""
        for ids in super().batches(seed):
            with torch.no_grad():
                found = self.teacher(ids).log_softmax(-1).topk(NAMED, -1)
            yield ids, found.indices, found.values

    def features(self, model: nn.Module, batch: Any) -> Features:
        """Hidden states, and the embedding that is the head too."""
        return super().features(model, batch[0])

    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """Beside its teacher; and the model continues a word."""
        say(f"Held-out perplexity of the teacher: {self.perplexity:,.2f}.")
        super().epilogue(model, seed, say)


def load(quick: bool) -> Task:
    """The task, its text read and its teacher trained."""
    return Distillation(quick)
