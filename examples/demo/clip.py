"""CLIP's loss on pairs of texts: a topic's title and some words, and the words that follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neglog

from .task import Features, Say, Task
from .text import Tokenizer, topics
from .topics import HELD_OUT, distinct
from .towers import Towers

BATCH, QUICK_BATCH = 2048, 1024
# Words a side. No two pairs of a batch share one: a neighbour would be a second right answer.
SIDE = 14
TITLE = 4


class Pairs(NamedTuple):
    """(pairs, TITLE + SIDE) and (pairs, SIDE)."""

    before: Tensor
    after: Tensor


class Passage(NamedTuple):
    """Ids of a topic's title, and of its text up to the held-out end and from there."""

    title: Tensor
    train: Tensor
    held_out: Tensor


def passages() -> tuple[int, list[Passage]]:
    """Of all topics, and the vocabulary, which knows the training parts only."""
    texts = {name: text for name, text in distinct(topics()) if text}
    split = {name: int(len(text) * (1 - HELD_OUT)) for name, text in texts.items()}
    tokenizer = Tokenizer("\n\n".join(text[: split[name]] for name, text in texts.items()))
    made = []
    for name, text in texts.items():
        parts = text.partition("\n")[0], text[: split[name]], text[split[name] :]
        title, *bodies = (torch.tensor(tokenizer.encode(part), dtype=torch.long) for part in parts)
        title = F.pad(title[:TITLE], (0, max(0, TITLE - len(title))))
        made.append(Passage(title, *bodies))
    return len(tokenizer), made


def pairs_from(title: Tensor, words: Tensor, offset: int) -> Pairs:
    """Side by side from `offset` on, a pair every 2 SIDE words."""
    count = max(0, len(words) - offset) // (2 * SIDE)
    found = words[offset : offset + count * 2 * SIDE].view(count, 2 * SIDE)
    before, after = found.split(SIDE, dim=1)
    return Pairs(torch.cat([title.expand(len(found), -1), before], 1), after)


def together(pairs: list[Pairs]) -> Pairs:
    """As one."""
    before, after = (torch.cat(side) for side in zip(*pairs, strict=True))
    return Pairs(before, after)


def torch_loss(features: Features, _: Any) -> Tensor:
    """open_clip's ClipLoss: both matrices of logits in memory."""
    image, text, scale = features
    per_image = scale * image @ text.t()
    per_text = scale * text @ image.t()
    labels = torch.arange(len(image))
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def neglog_loss(features: Features, _: Any) -> Tensor:
    """The same, the matrix once."""
    image, text, scale = features
    return neglog.clip_loss(image, text, scale)


class Clip(Task):
    """Batches are pairs from all topics."""

    title = "Two towers trained by CLIP's loss, twice: only the loss function differs"
    steps = 100
    rate = 2e-3
    losses = {"torch": torch_loss, "neglog": neglog_loss}  # noqa: RUF012
    metric_format = "{:.1%}"

    def __init__(self, quick: bool) -> None:
        self.vocab, self.passages = passages()
        shortest = sum((len(passage.train) + 1) // (2 * SIDE) - 1 for passage in self.passages)
        self.batch = min(QUICK_BATCH if quick else BATCH, shortest)  # the text of another Python
        self.held_out = together([pairs_from(x.title, x.held_out, 0) for x in self.passages])
        count = len(self.held_out.after)
        self.metric = f"held-out recall@1 (chance {1 / count:.1%})"

    def describe(self) -> str:
        """Words to train on, pairs held out, vocabulary."""
        words = sum(len(passage.train) for passage in self.passages)
        return (
            f"Python's own documentation, {words:,} tokens to train on; pairs: a topic's title "
            f"with {SIDE} tokens, and the {SIDE} after them; {len(self.held_out.after):,} pairs "
            f"held out, vocabulary {self.vocab:,}"
        )

    def shape(self) -> str:
        """What is found among how many."""
        return f"each of {self.batch:,} texts finds the one that follows it, and the reverse"

    def model(self) -> Towers:
        """Two towers with random weights."""
        return Towers(self.vocab)

    def batches(self, seed: int) -> Iterator[Pairs]:
        """Pairs cut anew each time, and of all of them a random part."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            offsets = torch.randint(2 * SIDE, (len(self.passages),), generator=generator).tolist()
            cut = together([
                pairs_from(passage.title, passage.train, offset)
                for passage, offset in zip(self.passages, offsets, strict=True)
            ])  # fmt: skip
            chosen = torch.randperm(len(cut.after), generator=generator)[: self.batch]
            yield Pairs(cut.before[chosen], cut.after[chosen])

    def features(self, model: nn.Module, batch: Any) -> Features:
        """Both embeddings and the scale."""
        return model(*batch)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """How often the text that follows is the closest of all held-out ones."""
        return self.recall(model, 1)

    def recall(self, model: nn.Module, among: int) -> float:
        """How often it is among the closest so many."""
        before, after, _ = model(*self.held_out)
        found = (before @ after.t()).topk(among, dim=1).indices
        return (found == torch.arange(len(found))[:, None]).any(1).float().mean().item()

    @torch.no_grad()
    def epilogue(self, model: nn.Module, seed: int, say: Say) -> None:
        """How well held-out pairs are found, beside chance and towers that learned nothing."""
        torch.manual_seed(seed)
        untrained = self.model()
        count = len(self.held_out.after)
        for among in (1, 10):
            say(
                f"Held-out recall@{among}: {self.recall(model, among):.1%} of {count:,} pairs; "
                f"untrained {self.recall(untrained, among):.1%}, chance {among / count:.1%}."
            )
        say(f"The learned scale: {self.features(model, self.held_out)[2].item():.1f}.")


def load(quick: bool) -> Task:
    """The task, its text read."""
    return Clip(quick)
