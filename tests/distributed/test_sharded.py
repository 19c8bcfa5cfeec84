"""DTensors on meshes of two dimensions, sequence-parallel hidden states, and heads of fully_shard:
what one process computes, and what is sent."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import neglog
from neglog import dispatch
from tests.distributed.test_tensors import (
    HEAD,
    LOGITS,
    MASK,
    OPTIONS,
    TARGET,
    WIDTH,
    normal,
    same,
)
from tests.support import ranks
from tests.support.backends import BEST

ROWS_CLASSES = ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)])
R = Replicate()


def two_dimensions() -> Any:
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))


def logits(rank: int, world: int) -> None:
    for options in OPTIONS.values():
        layouts = [
            *({"input": layout} for layout in ROWS_CLASSES),
            {"input": [Shard(0), Shard(1)], "target": [Shard(0), R]},
            {"input": [Shard(0), Shard(1)], "target": [R, Shard(0)], "weight": [R, Shard(0)]},
            {"input": [R, Shard(1)]}, {"input": [Shard(1), Shard(1)]},
        ]  # fmt: skip
        same(neglog.cross_entropy, LOGITS, options, *layouts, mesh=two_dimensions())


def masked(rank: int, world: int) -> None:
    tensors = {"input": LOGITS["input"], "target": TARGET.abs() % 7}
    for options in OPTIONS.values():
        layouts = [{"input": layout} for layout in ROWS_CLASSES]
        layouts.append({"input": [Shard(0), Shard(1)], "mask": [Shard(0), R]})
        same(neglog.masked_cross_entropy, tensors, {**options, "mask": MASK}, *layouts,
             mesh=two_dimensions())  # fmt: skip


def heads(rank: int, world: int) -> None:
    """Rows over one dimension and classes over the other; classes over the dimension that rows are
    sharded over too, as after a sequence-parallel layer."""
    tensors = {"input": normal(5, WIDTH), "target": TARGET, **HEAD}
    by_class = {"linear_weight": [R, Shard(0)], "linear_bias": [R, Shard(0)]}
    for options in OPTIONS.values():
        layouts = [
            {"input": [Shard(0), R], **by_class},
            {"input": [Shard(0), R], **by_class, "target": [Shard(0), R]},
            {"input": [R, Shard(0)], **by_class},
            {"input": [Shard(0), Shard(0)], **by_class},
            {"input": [Shard(0), R]},
            {"input": [Shard(0), Shard(0)], "linear_weight": [R, R], "linear_bias": [R, R]},
            {"input": [R, Shard(1)], **by_class},
            {"input": [Shard(0), R], "linear_weight": [R, Shard(1)]},
            {**by_class},
        ]  # fmt: skip
        same(neglog.linear_cross_entropy, tensors, options, *layouts, mesh=two_dimensions())


def sequences(rank: int, world: int) -> None:
    """(B, T, D), whose positions are sharded over the batch, the sequence or both; shifted and
    masked."""
    mask = torch.arange(15).view(3, 5) % 4 != 1
    tensors = {
        "input": normal(3, 5, WIDTH), "target": (torch.arange(15) * 3 % 7).view(3, 5), **HEAD,
    }  # fmt: skip
    by_class = {"linear_weight": [R, Shard(0)], "linear_bias": [R, Shard(0)]}
    layouts = [
        {"input": [Shard(0), Shard(1)], **by_class},
        {"input": [Shard(1), R], **by_class, "target": [Shard(1), R]},
        {"input": [Shard(1), Shard(1)], "linear_weight": [R, R], "linear_bias": [R, R]},
    ]  # fmt: skip
    for options in ({}, {"shift": True}, {"mask": mask}, {"mask": mask, "shift": True}):
        for more in ({}, {"reduction": "none"}, {"return_stats": True}):
            given = {**options, **more}
            same(neglog.linear_cross_entropy, tensors, given, *layouts, mesh=two_dimensions())


def nothing_of_the_size_of_the_head(rank: int, world: int) -> None:
    """Is sent: neither logits nor weights."""
    rows, width, vocab = 8, 16, 512
    mesh = two_dimensions()
    generator = torch.Generator().manual_seed(0)

    def placed(shape: tuple[int, ...], placements: list[Any]) -> DTensor:
        made = torch.randn(shape, generator=generator)
        return distribute_tensor(made, mesh, placements).requires_grad_()

    hidden = placed((rows, width), [Shard(0), R])
    weight = placed((vocab, width), [R, Shard(0)])
    scores = placed((rows, vocab), [Shard(0), Shard(1)])
    target = torch.arange(rows)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with (
        dispatch.record() as ran,
        torch.profiler.profile(activities=kinds, record_shapes=True) as p,
    ):
        neglog.cross_entropy(scores, target).backward()
        loss = neglog.linear_cross_entropy(hidden, weight, target)
        torch.autograd.grad(loss, hidden)
    assert all(name.endswith(f":{BEST}") for name in ran), ran
    sent = [
        event for event in p.events() if event.name.startswith(("c10d::", "_c10d_functional::"))
    ]
    assert sent
    for event in sent:
        sizes = [torch.Size(shape).numel() for shape in event.input_shapes if shape]
        assert max([0, *sizes]) < vocab, (event.name, event.input_shapes)


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.head = Head()
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(ids))), ids)


class Head(nn.Module):
    """Its forward has the whole weight, whichever unit of fully_shard it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 8))

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return neglog.linear_cross_entropy(hidden, self.weight, ids, shift=True)


def heads_of_fully_shard(tied: bool, own_unit: bool, rank: int, world: int) -> None:
    """The mean of gradients over processes, as fully_shard takes it."""
    whole, model = Model(tied), Model(tied)
    if own_unit:
        fully_shard(model.head)
    fully_shard(model)
    ids = torch.arange(12).view(2, 6) * (rank + 3) % 11
    with dispatch.record() as ran:
        model(ids).backward()
    assert f"linear_nll:{BEST}" in ran
    whole(ids).backward()
    for (name, x), (_, y) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        expected = y.grad.clone()
        dist.all_reduce(expected)
        torch.testing.assert_close(x.grad.full_tensor(), expected / world, msg=name)


def a_sharded_weight_beside_rows_of_its_own(rank: int, world: int) -> None:
    """A weight that fully_shard holds looks like one whose classes are shared out; but the rows of
    each process are its own, which is said and not computed."""
    model = Model(False)
    fully_shard(model.head)
    hidden, ids = torch.randn(6, 8), torch.arange(6) * (rank + 1) % 11
    with pytest.raises(RuntimeError, match="group: expected one target in all processes"):
        neglog.linear_cross_entropy(hidden, model.head.weight, ids)


CHECKS: dict[int, dict[str, Any]] = {
    4: {x.__name__: x for x in (logits, masked, heads, sequences, nothing_of_the_size_of_the_head)},
    2: {
        f"heads of fully_shard, {tied}, {own}": partial(heads_of_fully_shard, tied, own)
        for tied in (False, True)
        for own in (False, True)
        if not (tied and own)
    }
    | {"beside rows of its own": a_sharded_weight_beside_rows_of_its_own},
}


@pytest.mark.parametrize("world", CHECKS)
def test_processes(world: int, tmp_path: Any) -> None:
    said = ranks.run(CHECKS[world], world, tmp_path, seconds=200)
    failed = {name: next(x for x in each if x) for name, each in said.items() if any(each)}
    assert not failed, "\n".join(f"{name}: {error[-900:]}" for name, error in failed.items())
