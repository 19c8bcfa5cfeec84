"""Processes of a group: that they agree on a call, and how many rows each has.

They agree by one collective of the host, of a fixed size whatever they have: one of unlike sizes
would wait for ever, or end the process. It lies in the CPU's memory where the group has a backend
for that, as those of init_process_group() without a backend have, so that no process waits for its
device. While torch.compile traces, nothing is asked, and all processes count as alike.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from neglog import torch_state
from neglog.ops.dtypes import DTYPE_CODES

LENGTH = 32  # numbers of what a process says of a call
_NONE, _TENSOR = -(1 << 62), -(1 << 62) + 1


class Ranks(NamedTuple):
    """The processes of a group, of which this is `rank`, and the rows of each."""

    group: Any
    rank: int
    rows: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def starts(self) -> list[int]:
        """The row of all at which each process's begin; then their number."""
        return list(accumulate(self.rows, initial=0))

    @property
    def first(self) -> int:
        return self.starts[self.rank]

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + self.rows[self.rank])

    @property
    def name(self) -> str:
        """By which an op finds the group again."""
        return str(self.group.group_name)


def check_group(group: Any) -> None:
    if not isinstance(group, getattr(distributed, "ProcessGroup", ())):
        raise TypeError(
            "group: expected a ProcessGroup of torch.distributed or None, "
            f"got {type(group).__name__}"
        )


def group_named(name: str) -> Any:
    """The group of `Ranks.name`."""
    resolve: Any = distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def meet(call: str, group: Any, x: Tensor, rows: int, /, **terms: Any) -> Ranks:
    """The processes that make this call, of which each has `rows` rows. As `meet_with`."""
    return meet_with(call, group, x, [rows], **terms)[0]


def meet_with(
    call: str, group: Any, x: Tensor, counts: Sequence[int], /, **terms: Any
) -> list[Ranks]:  # fmt: skip
    """The processes that make this call, for each of several kinds of rows that each has some of.

    call: the function's name. x: a tensor of the call, whose dtype and device all must have.
    counts: how many rows of each kind; they need not be alike. terms: what else must be alike, by
    the argument's name: None, a bool, an int, a float, a string of up to 8 letters, a dtype; of a
    Tensor, that it is one.

    Raises RuntimeError, in each process, that names what is not alike and what each has.
    """
    if torch_state.compiling():
        world = distributed.get_world_size(group)
        return [Ranks(group, distributed.get_rank(group), (rows,) * world) for rows in counts]
    terms = {"dtype": x.dtype, "device": x.device.type} | terms
    mine = [zlib.crc32(call.encode()), *(_code(term) for term in terms.values()), *counts]
    found = _all_say(mine, group, x)
    others = [rank for rank, one in enumerate(found) if one[0] != mine[0]]
    if others:
        raise RuntimeError(
            f"group: expected one function in all processes, got {call} here and another on ranks "
            f"{others}"
        )
    for place, (name, term) in enumerate(terms.items(), start=1):
        said = [one[place] for one in found]
        if len(set(said)) > 1:
            each = ", ".join(_shown(code, term) for code in said)
            raise RuntimeError(f"group: expected one {name} in all processes, got {each}, by rank")
    rank = distributed.get_rank(group)
    columns = list(zip(*found, strict=True))[1 + len(terms) :]
    return [Ranks(group, rank, rows) for rows in columns[: len(counts)]]


def as_term(value: Any) -> Any:
    """A number as a float, whether it was given as one or not; what else may be a term as it is."""
    if isinstance(value, bool | str | Tensor) or value is None:
        return value
    return float(value)


def learning(*tensors: Any) -> int:
    """As a term: which of these may have a gradient. They must be the same in all processes, which
    wait for each other in the backward too."""
    return sum(
        1 << place
        for place, x in enumerate(tensors)
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad
    )


def _all_say(mine: list[int], group: Any, x: Tensor) -> list[list[int]]:
    """What each process says."""
    assert len(mine) <= LENGTH
    backends = distributed.get_backend_config(group)
    device = "cpu" if "cpu:" in backends else x.device
    sent = torch.tensor(mine + [0] * (LENGTH - len(mine)), dtype=torch.int64, device=device)
    received = list(sent.new_empty(distributed.get_world_size(group), LENGTH).unbind())
    distributed.all_gather(received, sent, group)
    return torch.stack(received).tolist()


def _code(term: Any) -> int:
    """A number that is another's where the term is."""
    if term is None:
        return _NONE
    if isinstance(term, Tensor):
        return _TENSOR
    if isinstance(term, torch.dtype):
        return DTYPE_CODES.get(term, zlib.crc32(str(term).encode()))
    if isinstance(term, float):
        return int(struct.unpack("<q", struct.pack("<d", term))[0])
    if isinstance(term, str):
        return int.from_bytes(term.encode()[:8], "little", signed=True)
    return int(term)


def _shown(code: int, like: Any) -> str:
    """The term of a code, where it is of the kind of `like`."""
    if code in (_NONE, _TENSOR):
        return "None" if code == _NONE else "a Tensor"
    if isinstance(like, torch.dtype):
        return next((str(dtype) for dtype, own in DTYPE_CODES.items() if own == code), "another")
    if isinstance(like, bool):
        return str(bool(code))
    if isinstance(like, str):
        return repr(code.to_bytes(8, "little", signed=True).rstrip(b"\0").decode(errors="replace"))
    if isinstance(like, float):
        return repr(struct.unpack("<d", struct.pack("<q", code))[0])
    return str(code)
