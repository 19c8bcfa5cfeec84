"""Fine-tuning: which topic is a window of text from? A pretrained encoder against a random one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import neglog

from .bert import Classifier, encoder
from .task import Say
from .text import windows
from .topics import Topic

CLASSES = 12
LENGTH = 30
BATCH = 32
RATE = 1e-3
STEPS, QUICK_STEPS = 60, 4


def compare(
    pretrained: Any, topics: list[Topic], frame: Callable[[Tensor], Tensor], seed: int,
    quick: bool, say: Say,
) -> None:  # fmt: skip
    """Fine-tune both alike, and print their held-out accuracies beside chance."""
    chosen = topics[:CLASSES]
    ids, labels = _cut(chosen)
    ids = frame(ids)
    steps = QUICK_STEPS if quick else STEPS
    vocab = pretrained.config.vocab_size
    torch.manual_seed(seed)
    encoders = (copy.deepcopy(pretrained), encoder(vocab))
    found = []
    for start in encoders:
        classifier = _fine_tune(start, chosen, frame, seed, steps)
        found.append(_accuracy(classifier, ids, labels))
    chance = labels.bincount().max().item() / len(labels)
    say(
        f"Fine-tuned for {steps} steps to tell {len(chosen)} topics apart, {len(labels)} held-out "
        f"windows of {LENGTH} pieces: accuracy {found[0]:.1%}; from a random encoder "
        f"{found[1]:.1%}; always the most frequent topic {chance:.1%}."
    )


def _cut(topics: list[Topic]) -> tuple[Tensor, Tensor]:
    """Held-out windows side by side, and the number of the topic of each."""
    cut = [topic.held_out.unfold(0, LENGTH, LENGTH) for topic in topics]
    labels = [torch.full((len(some),), number) for number, some in enumerate(cut)]
    return torch.cat(cut), torch.cat(labels)


def _fine_tune(
    start: Any, topics: list[Topic], frame: Callable[[Tensor], Tensor], seed: int, steps: int
) -> Classifier:
    """Head and encoder, by windows drawn from topics drawn in proportion to their lengths."""
    torch.manual_seed(seed)
    classifier = Classifier(start, len(topics))
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, fused=True)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([float(len(topic.train)) for topic in topics])
    for _ in range(steps):
        labels = lengths.multinomial(BATCH, replacement=True, generator=generator)
        drawn = [windows(topics[label].train, LENGTH, 1, generator) for label in labels]
        loss = neglog.cross_entropy(classifier(frame(torch.cat(drawn))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


@torch.no_grad()
def _accuracy(classifier: Classifier, ids: Tensor, labels: Tensor) -> float:
    guesses = torch.cat([classifier(some).argmax(-1) for some in ids.split(BATCH)])
    return (guesses == labels).float().mean().item()
