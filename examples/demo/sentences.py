"""Python's documentation by sentence, in MiniLM's word pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .text import topics
from .topics import distinct

# Of each sentence, [CLS] and [SEP] among them: an encoder's time is in its pieces.
LENGTH = 12
WORDS = 4
HELD_OUT = 0.1
END = re.compile(r'(?<=[.!?:])\s+(?=[A-Z"*(])')
WORD = re.compile(r"[A-Za-z]{2,}")


class Text(NamedTuple):
    """Pieces and their attention mask, (sentences, LENGTH) each."""

    ids: Tensor
    mask: Tensor

    def rows(self, index: Any) -> Text:
        """Those sentences."""
        return Text(self.ids[index], self.mask[index])


class Sentences(NamedTuple):
    """Distinct ones. Of the held-out, `following[i]` came after `first[i]` in its paragraph."""

    train: Text
    first: Text
    following: Text


def split(paragraph: str) -> list[str]:
    """Its sentences of a few words; code and grammars have hardly any."""
    found = END.split(" ".join(paragraph.split()))
    return [sentence for sentence in found if len(WORD.findall(sentence)) >= WORDS]


def paragraphs() -> Iterator[tuple[list[str], bool]]:
    """The sentences of each paragraph, and whether it lies in its topic's held-out end."""
    for _, text in distinct(topics()):
        made = text.split("\n\n")
        for number, paragraph in enumerate(made):
            yield split(paragraph), number >= len(made) * (1 - HELD_OUT)


def load(tokenizer: Any) -> Sentences:
    """Cut at LENGTH; sentences that are alike up to there are one."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    seen: set[tuple[int, ...]] = set()
    train: list[Any] = []
    pairs: list[tuple[Any, Any]] = []
    # The held-out first: what is there as well as in the training text is then not trained on.
    for sentences, held_out in sorted(paragraphs(), key=lambda paragraph: not paragraph[1]):
        new = []
        for piece in tokenizer.encode_batch(sentences):
            if tuple(piece.ids) not in seen:
                seen.add(tuple(piece.ids))
                new.append(piece)
        if held_out:
            pairs.extend(pairwise(new))
        else:
            train.extend(new)
    first, following = zip(*pairs, strict=True)
    return Sentences(_text(train), _text(first), _text(following))


def _text(pieces: Any) -> Text:
    return Text(
        torch.tensor([piece.ids for piece in pieces]),
        torch.tensor([piece.attention_mask for piece in pieces]),
    )
