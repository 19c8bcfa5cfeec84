"""Masked language model: a small BERT, 15% of its tokens hidden from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neglog
from neglog.bench.terminal import need

from .task import Features, Say, Task
from .text import windows
from .topics import EXTRA, PURPOSE, wordpiece
from .topics import load as load_topics

if TYPE_CHECKING:
    from .bert import MaskedLM

BATCH = 32
# BERT's: the share of tokens to predict; of those, the shares that [MASK] and any piece replace.
MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1
QUICK_WINDOWS = 64


class Batch(NamedTuple):
    """What the model reads, what was there, and where it is asked."""

    inputs: Tensor
    tokens: Tensor
    mask: Tensor


def torch_loss(features: Features, batch: Batch) -> Tensor:
    """Logits of all positions, -100 at those that are not asked: Transformers' BertForMaskedLM."""
    hidden, weight, bias = features
    target = batch.tokens.masked_fill(~batch.mask, -100)
    return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), target.flatten())


def neglog_loss(features: Features, batch: Batch) -> Tensor:
    """The same; positions that are not asked leave before the matmul."""
    hidden, weight, bias = features
    return neglog.linear_cross_entropy(
        hidden, weight, batch.tokens, linear_bias=bias, mask=batch.mask
    )


def gathered_loss(features: Features, batch: Batch) -> Tensor:
    """What torch can do where somebody gathers the rows for it."""
    hidden, weight, bias = features
    logits = F.linear(hidden[batch.mask], weight, bias)
    return F.cross_entropy(logits, batch.tokens[batch.mask])


class Masking(NamedTuple):
    """BERT's rule: ids of its special tokens, and the number of pieces to draw from."""

    cls: int
    sep: int
    mask: int
    vocab: int

    def __call__(self, text: Tensor, generator: torch.Generator) -> Batch:
        """text (batch, time), to stand between [CLS] and [SEP], which are never asked for."""
        drawn = torch.rand(text.shape, generator=generator)
        how = torch.rand(text.shape, generator=generator)
        other = torch.randint(self.vocab, text.shape, generator=generator)
        mask = drawn < MASKED
        inputs = text.masked_fill(mask & (how < HIDDEN), self.mask)
        inputs = torch.where(mask & (how >= 1 - REPLACED), other, inputs)
        return Batch(self.framed(inputs), self.framed(text), F.pad(mask, (1, 1)))

    def framed(self, text: Tensor) -> Tensor:
        """[CLS] before, [SEP] behind."""
        return F.pad(F.pad(text, (1, 0), value=self.cls), (0, 1), value=self.sep)


class MaskedLanguageModel(Task):
    """Batches are windows of word pieces, some of them hidden."""

    title = "A small BERT, trained twice: only the loss function differs"
    steps = 100
    rate = 7e-4
    losses = {"torch": torch_loss, "neglog": neglog_loss}  # noqa: RUF012
    by_hand = ("torch on the masked rows alone, gathered by hand", gathered_loss)

    def __init__(self, quick: bool) -> None:
        tokenizer = wordpiece()
        need("transformers", PURPOSE, EXTRA)
        self.quick = quick
        self.topics = load_topics(tokenizer)
        cls, sep, mask = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
        self.masking = Masking(cls, sep, mask, tokenizer.get_vocab_size())
        self.train = torch.cat([topic.train for topic in self.topics])
        self.held_out = torch.cat([topic.held_out for topic in self.topics])

    def describe(self) -> str:
        """Tokens to train on, tokens held out, vocabulary."""
        return (
            f"Python's own documentation, {len(self.train):,} word pieces to train on, "
            f"{len(self.held_out):,} held out, vocabulary {self.masking.vocab:,}"
        )

    def shape(self) -> str:
        """The hidden tokens out of the vocabulary."""
        return f"{MASKED:.0%} of the tokens, vocabulary {self.masking.vocab:,}"

    def model(self) -> MaskedLM:
        """A BERT of 2 layers."""
        from .bert import MaskedLM

        return MaskedLM(self.masking.vocab)

    def _length(self) -> int:
        from .bert import CONTEXT

        return CONTEXT - 2  # [CLS] and [SEP] take two places

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random windows, masked anew each time."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.masking(windows(self.train, self._length(), BATCH, generator), generator)

    def features(self, model: nn.Module, batch: Any) -> Features:
        """Hidden states at all positions, the tied head and its bias."""
        masked_lm: Any = model
        return masked_lm(batch.inputs), masked_lm.weight, masked_lm.bias

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """exp of the mean loss per masked token of the held-out text, masked always alike."""
        generator = torch.Generator().manual_seed(0)
        length = self._length()
        text = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        total, count = 0.0, 0
        for some in text[: QUICK_WINDOWS if self.quick else None].split(BATCH):
            batch = self.masking(some, generator)
            asked = int(batch.mask.sum())
            total += gathered_loss(self.features(model, batch), batch).item() * asked
            count += asked
        return math.exp(total / count)

    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """How many hidden pieces it names."""
        named, frequent, asked = self._guesses(model)
        say(
            f"Of {asked:,} hidden pieces of held-out text its first guess names "
            f"{named / asked:.1%}; always the most frequent piece: {frequent / asked:.1%}. "
            "What pretraining is good for shows: neglog demo --task pretrain"
        )

    @torch.no_grad()
    def _guesses(self, model: nn.Module) -> tuple[int, int, int]:
        """Of some held-out windows: pieces named, the most frequent ones, all that are asked."""
        generator = torch.Generator().manual_seed(0)
        length = self._length()
        text = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        batch = self.masking(text[:QUICK_WINDOWS], generator)
        hidden, weight, bias = self.features(model, batch)
        wanted = batch.tokens[batch.mask]
        guesses = F.linear(hidden[batch.mask], weight, bias).argmax(-1)
        frequent = self.train.bincount().argmax()
        return int((guesses == wanted).sum()), int((wanted == frequent).sum()), len(wanted)


def load(quick: bool) -> Task:
    """The task, its text read; a refusal where a package is missing."""
    return MaskedLanguageModel(quick)
