"""Unsupervised SimCSE: a sentence goes through dropout twice, and must find itself again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neglog
from neglog.bench.terminal import need

from .sentences import LENGTH, Text
from .sentences import load as load_sentences
from .task import Features, Say, Task
from .topics import EXTRA, wordpiece

PURPOSE = "demo --task simcse"
BATCH, QUICK_BATCH = 64, 32
TEMPERATURE = 0.05
QUICK_LAYERS = 2


class Batch(NamedTuple):
    """Sentences, and where the dropout of this step begins: both runs then drop the same."""

    text: Text
    seed: int


def torch_loss(features: Features, _: Any) -> Tensor:
    """Cosines of all pairs in memory; the diagonal is the target."""
    first, second = (F.normalize(x, dim=-1) for x in features)
    scores = first @ second.t() / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores)))


def neglog_loss(features: Features, _: Any) -> Tensor:
    """The same."""
    first, second = features
    return neglog.info_nce(first, second, temperature=TEMPERATURE)


class SimCSE(Task):
    """Batches are distinct sentences."""

    title = "MiniLM fine-tuned by SimCSE, twice: only the loss function differs"
    steps = 16
    rate = 3e-5
    losses = {"torch": torch_loss, "neglog": neglog_loss}  # noqa: RUF012
    metric_format = "{:.1%}"

    def __init__(self, quick: bool) -> None:
        tokenizer = wordpiece(PURPOSE)
        need("transformers", PURPOSE, EXTRA)
        self.quick = quick
        self.batch = QUICK_BATCH if quick else BATCH
        self.sentences = load_sentences(tokenizer)
        count = len(self.sentences.first.ids)
        self.metric = f"held-out next sentence found (chance {1 / count:.1%})"

    def describe(self) -> str:
        """The encoder and the sentences."""
        cut = f", its first {QUICK_LAYERS} layers alone (--quick)" if self.quick else ""
        return (
            f"all-MiniLM-L6-v2{cut}; {len(self.sentences.train.ids):,} distinct sentences of "
            f"Python's own documentation, cut at {LENGTH} pieces"
        )

    def shape(self) -> str:
        """What is found among how many."""
        return f"each sentence among {self.batch}"

    def model(self) -> nn.Module:
        """MiniLM as it was published."""
        from .minilm import MiniLM

        return MiniLM(QUICK_LAYERS if self.quick else None)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Epochs of shuffled sentences, the last few of each left out."""
        generator = torch.Generator().manual_seed(seed)
        train = self.sentences.train
        step = 0
        while True:
            order = torch.randperm(len(train.ids), generator=generator)
            for chosen in order[: len(order) // self.batch * self.batch].split(self.batch):
                yield Batch(train.rows(chosen), seed + step)
                step += 1

    def features(self, model: nn.Module, batch: Any) -> Features:
        """Both passes as one, twice the rows: each row drops its own."""
        twice = Text(*(torch.cat([x, x]) for x in batch.text))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch.seed)
            return model(twice).chunk(2)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """How often the sentence that follows is the closest of all that follow one."""
        model.eval()
        first, following = (
            F.normalize(torch.cat([model(Text(*part)) for part in _chunks(text)]), dim=-1)
            for text in (self.sentences.first, self.sentences.following)
        )
        model.train()
        found = (first @ following.t()).argmax(1)
        return (found == torch.arange(len(found))).float().mean().item()

    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """What the encoder found before the fine-tuning, and a step of a large batch."""
        from . import large

        before = self.metric_format.format(self.score(self.model()))
        say(f"{self.metric[0].upper()}{self.metric[1:]}: {before} before the fine-tuning.")
        text = self.sentences.train
        order = torch.randperm(len(text.ids), generator=torch.Generator().manual_seed(seed))
        large.compare(model, text.rows(order), (torch_loss, neglog_loss), seed, self.quick, say)


def _chunks(text: Text) -> Iterator[tuple[Tensor, ...]]:
    return zip(*map(partial(torch.split, split_size_or_sections=BATCH), text), strict=True)


def load(quick: bool) -> Task:
    """The task, its text read; a refusal where a package is missing."""
    return SimCSE(quick)
