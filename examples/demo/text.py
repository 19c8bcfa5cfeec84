"""The text every Python ships, and a word-level tokenizer made from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from neglog.bench import Refusal

# A word or a run of signs with the space before it, or white space: every character is in a piece.
PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+(?=\s)|\s+")
BYTES = 256
VOCAB = 8192
HELD_OUT = 0.1
# Of the training pieces. Its vocabulary knows them all, so the model would never meet a byte, and
# one new word would spoil the perplexity of the held-out text.
SPELLED = 0.05


def topics() -> dict[str, str]:
    """The reference documentation behind Python's help(), about 470,000 characters."""
    try:
        from pydoc_data import topics as shipped
    except ImportError as error:
        raise Refusal(
            "demo reads pydoc_data.topics, which this Python was installed without"
        ) from error
    return shipped.topics


class Tokenizer:
    """Ids below 256 are bytes; then the text's most frequent pieces, most frequent first.

    A piece that is not in the vocabulary is spelled in bytes, so every string has ids and comes
    back from them unchanged.
    """

    def __init__(self, text: str, vocab: int = VOCAB) -> None:
        frequent = Counter(PIECE.findall(text)).most_common(vocab - BYTES)
        self._spelling = [bytes([byte]) for byte in range(BYTES)]
        self._spelling += [_to_bytes(piece) for piece, _ in frequent]
        self._ids = {piece: BYTES + rank for rank, (piece, _) in enumerate(frequent)}

    def __len__(self) -> int:
        return len(self._spelling)

    def encode(self, text: str, spelled: float = 0.0) -> list[int]:
        """Ids of a string; `spelled` is the share of known pieces that are spelled all the same."""
        chance = Random(0)
        ids: list[int] = []
        for piece in PIECE.findall(text):
            known = self._ids.get(piece)
            if known is None or chance.random() < spelled:
                ids.extend(_to_bytes(piece))
            else:
                ids.append(known)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The string of ids. Bytes that spell nothing, as a model may write, become U+FFFD."""
        spelled = b"".join(self._spelling[index] for index in ids)
        try:
            return spelled.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return spelled.decode("utf-8", "replace")


def _to_bytes(piece: str) -> bytes:
    return piece.encode("utf-8", "surrogatepass")  # a lone surrogate is a string too


class Data(NamedTuple):
    """Token ids: what is trained on, and the text's last tenth."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor


def load() -> Data:
    """The text, split and tokenized; the vocabulary knows the training part only."""
    text = "\n\n".join(topics().values())
    split = int(len(text) * (1 - HELD_OUT))
    tokenizer = Tokenizer(text[:split])
    train = tokenizer.encode(text[:split], SPELLED)
    held_out = tokenizer.encode(text[split:])
    return Data(tokenizer, torch.tensor(train), torch.tensor(held_out))


def windows(tokens: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Random ones, (count, length)."""
    start = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[start + torch.arange(length)]
