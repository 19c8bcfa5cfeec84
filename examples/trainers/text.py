"""What the examples train on: Python's own documentation, as token ids."""

from __future__ import annotations

import torch
from torch import Tensor

from neglog.examples.demo.text import Tokenizer, topics

VOCAB = 32000  # of a tokenizer as language models have it


def tokens() -> Tensor:
    """(T,) ids below VOCAB: words, and bytes of rare ones."""
    text = "\n\n".join(topics().values())
    return torch.tensor(Tokenizer(text, VOCAB).encode(text, spelled=0.05))


def rows(length: int) -> list[dict[str, list[int]]]:
    """The text in pieces of `length`, as a dataset of `input_ids` and `labels`."""
    ids = tokens()
    pieces = ids[: len(ids) // length * length].view(-1, length).tolist()
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def batches(length: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` batches of 8 random pieces."""
    ids = tokens()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length, (count, 8, 1), generator=generator)
    return list(ids[starts + torch.arange(length)])
