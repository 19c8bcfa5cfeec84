"""Calls over a process group: what must be alike, derivatives, torch.compile, what is sent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import neglog
from neglog.distributed import exchange as exchanges
from tests.support import ranks
from tests.support.allocations import largest_allocation
from tests.support.backends import BEST

FEATURES = 6
EXCHANGES = ("gather", "ring", "detached")


def pair_of(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return list(both.unbind())


LABELS = torch.arange(60) // 2
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, **o: neglog.clip_loss(x, y, 2.0, **o),
    "siglip": lambda x, y, **o: neglog.siglip_loss(x, y, 2.0, -1.0, **o),
    "info_nce": lambda x, y, **o: neglog.info_nce(x, y, temperature=0.5, **o),
    "queue": lambda x, y, **o: neglog.info_nce(x, y, y.flip(0), temperature=0.5, **o),
    "symmetric": lambda x, y, **o: neglog.info_nce(x, y, symmetric=True, label_smoothing=0.1, **o),
    "positives": lambda x, y, **o: neglog.info_nce(
        x, y, positives=(LABELS[: len(x)], LABELS[: len(y)]), **o
    ),
    "nt_xent": lambda x, y, **o: neglog.nt_xent(x, y, **o),
    "dcl": lambda x, y, **o: neglog.dcl(x, y, **o),
    "sup_con": lambda x, y, **o: neglog.sup_con(torch.cat([x, y]), LABELS[: 2 * len(x)], **o),
}


# What must be alike

ALIKE: dict[str, Callable[[int, Tensor, Tensor, Any], object]] = {
    "dtype": lambda rank, x, y, g: neglog.info_nce(*(z.to(DTYPES[rank]) for z in (x, y)), group=g),
    "features": lambda rank, x, y, g: neglog.info_nce(x[:, rank:], y[:, rank:], group=g),
    "exchange": lambda rank, x, y, g: neglog.nt_xent(x, y, group=g, exchange=EXCHANGES[rank]),
    "temperature": lambda rank, x, y, g: neglog.nt_xent(x, y, 0.1 + rank, group=g),
    "temperature in all processes, got a Tensor": lambda rank, x, y, g: neglog.dcl(
        x, y, (torch.tensor(0.1), 0.1)[rank], group=g
    ),
    "reduction": lambda rank, x, y, g: neglog.dcl(x, y, reduction=("sum", "mean")[rank], group=g),
    "normalize": lambda rank, x, y, g: neglog.sup_con(x, LABELS[:4], normalize=rank == 1, group=g),
    "exclude": lambda rank, x, y, g: neglog.clip_loss(
        x, y, 1.0, exclude=LABELS[:4] if rank else None, group=g
    ),
    "logit_scale": lambda rank, x, y, g: neglog.siglip_loss(x, y, 1.0 + rank, None, group=g),
    "symmetric": lambda rank, x, y, g: neglog.info_nce(x, y, symmetric=rank == 1, group=g),
    "smoothing": lambda rank, x, y, g: neglog.info_nce(x, y, label_smoothing=0.1 * rank, group=g),
    "negative_keys": lambda rank, x, y, g: neglog.info_nce(
        x, y, y if rank else None, negative_mode="in_batch", group=g
    ),
    "requires_grad": lambda rank, x, y, g: neglog.clip_loss(
        x.requires_grad_(rank == 1), y, 1.0, group=g
    ),
    "backend": lambda rank, x, y, g: neglog.dcl(x, y, group=g, backend=(BEST, "torch")[rank]),
    "function": lambda rank, x, y, g: (neglog.nt_xent, neglog.dcl)[rank](x, y, 0.1, group=g),
}
DTYPES = (torch.bfloat16, torch.float32)


def named(term: str, rank: int, world: int) -> None:
    """Each process says which argument is not alike; no number was sent yet, so the next call is
    right."""
    x, y = pair_of(4, torch.float32)
    with pytest.raises(RuntimeError, match=f"group: expected one {term}"):
        ALIKE[term](rank, x.clone(), y, dist.group.WORLD)
    neglog.clip_loss(x, y, 1.0, group=dist.group.WORLD)


# Bits and bytes


def sixteen_bits(loss: str, exchange: str, rank: int, world: int) -> None:
    """The error is that of one process, or near it."""
    rows = 20
    x, y = pair_of(rows * world)
    mine = slice(rank * rows, (rank + 1) * rows)
    exact = gradients(loss, x, y)
    dtype = torch.bfloat16
    expected = gradients(loss, x.to(dtype), y.to(dtype))
    found = gradients(
        loss, x[mine].to(dtype), y[mine].to(dtype), group=dist.group.WORLD, exchange=exchange
    )
    for ours, theirs, truth in zip(found[1:], expected[1:], exact[1:], strict=True):
        error = (ours.double() / world - truth[mine]).norm()
        assert error <= 1.3 * (theirs.double() - truth).norm() + 1e-9


def gradients(loss: str, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = LOSSES[loss](x, y, **options)
    return [value.detach(), *torch.autograd.grad(value, (x, y))]


def some_of_the_processes(loss: str, exchange: str, rank: int, world: int) -> None:
    """Two groups of two, at once."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x, y = pair_of(8, seed=rank % 2)
    mine = slice(4 * (rank // 2), 4 * (rank // 2 + 1))
    found = gradients(loss, x[mine], y[mine], group=groups[rank % 2], exchange=exchange)
    expected = gradients(loss, x, y)
    for ours, truth in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours / 2, truth[mine])
    dist.barrier()


def compiled_whole(loss: str, exchange: str, rank: int, world: int) -> None:
    torch.compiler.reset()
    x, y = pair_of(5, torch.float32, seed=rank)
    options = {"group": dist.group.WORLD, "exchange": exchange}
    expected = gradients(loss, x, y, **options)
    compiled = torch.compile(partial(LOSSES[loss], **options), fullgraph=True, backend="aot_eager")
    x, y = x.requires_grad_(), y.requires_grad_()
    value = compiled(x, y)
    found = [value.detach(), *torch.autograd.grad(value, (x, y))]
    torch.testing.assert_close(found, expected)


def sent_bytes(run: Callable[[], object]) -> list[int]:
    """Of each tensor that this process sends."""
    own, sizes = exchanges.Exchange.__init__, []

    def count(self: Any, group: Any, sent: Tensor, *others: Any) -> None:
        sizes.append(sent.nbytes)
        own(self, group, sent, *others)

    exchanges.Exchange.__init__ = count
    try:
        run()
    finally:
        exchanges.Exchange.__init__ = own
    return sizes


def a_gather_and_a_reduce_scatter(exchange: str, rank: int, world: int) -> None:
    """Of both directions of clip_loss together: (world - 1) N D numbers each way."""
    rows, width = 64, 256
    x, y = (torch.randn(rows, width, requires_grad=True) for _ in range(2))

    def run() -> None:
        neglog.clip_loss(x, y, 2.0, group=dist.group.WORLD, exchange=exchange).backward()

    sizes = sent_bytes(run)
    large = sum(size for size in sizes if size >= rows * width)
    ways = {"gather": 2 * (world - 1), "ring": 3 * world - 2}[exchange]  # its keys go round twice
    assert large == ways * rows * width * 4
    assert sum(sizes) - large <= 12 * world * rows * 8


def nothing_as_large_as_all_keys(rank: int, world: int) -> None:
    rows, width = 512, 64
    x, y = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
    for loss in ("clip", "siglip", "info_nce", "nt_xent"):
        kept = exchanges.PIECE_BYTES
        exchanges.PIECE_BYTES = 64 * width * 4
        try:
            options = {"group": dist.group.WORLD, "exchange": "ring"}
            most = largest_allocation(
                lambda loss=loss, options=options: LOSSES[loss](
                    x, y, options={"workspace_mb": 0.01}, **options
                ).backward()
            )
        finally:
            exchanges.PIECE_BYTES = kept
        assert most < world * rows * width * 4, loss


# A second each: every op once, and every loss.
COMPILED = {
    "gather": ("clip", "info_nce", "queue", "symmetric", "dcl"),
    "ring": ("siglip", "positives", "nt_xent", "sup_con"),
    "detached": ("clip",),
}
CHECKS: dict[int, dict[str, Any]] = {
    2: {f"{term} is named": partial(named, term) for term in ALIKE}
    | {
        f"{loss}, {exchange}, compiled": partial(compiled_whole, loss, exchange)
        for exchange, losses in COMPILED.items()
        for loss in losses
    },
    3: {
        f"{loss}, {exchange}, bfloat16": partial(sixteen_bits, loss, exchange)
        for loss in ("clip", "siglip", "info_nce", "nt_xent")
        for exchange in ("gather", "ring")
    }
    | {
        f"what {exchange} sends": partial(a_gather_and_a_reduce_scatter, exchange)
        for exchange in ("gather", "ring")
    }
    | {"memory of a ring": nothing_as_large_as_all_keys},
    4: {
        f"{loss}, {exchange}, two groups": partial(some_of_the_processes, loss, exchange)
        for loss in ("clip", "siglip", "info_nce", "symmetric", "nt_xent", "dcl")
        for exchange in ("gather", "ring")
    },
}


@pytest.fixture(scope="module", params=CHECKS)
def said(request: Any, tmp_path_factory: Any) -> dict[str, list[str]]:
    world = request.param
    return ranks.run(
        CHECKS[world], world, tmp_path_factory.mktemp("ranks"), seconds=200, one_group=True
    )


def test_processes(said: dict[str, list[str]]) -> None:
    failed = {name: next(x for x in each if x) for name, each in said.items() if any(each)}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


# A group of one


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_of_one_changes_nothing(
    group: Any, compiled_or_torch: Any, loss: str, exchange: str
) -> None:
    x, y = (part.requires_grad_() for part in pair_of(6))

    def derivatives(**options: Any) -> tuple[Tensor, ...]:
        value = LOSSES[loss](x, y, **options)
        first = torch.autograd.grad(value, (x, y), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    given = {"group": group, "exchange": exchange}
    torch.testing.assert_close(derivatives(**given), derivatives())
    of_x = torch.func.grad(lambda x: LOSSES[loss](x, y, **given))(x)
    torch.testing.assert_close(of_x, derivatives()[0])


@pytest.mark.parametrize("exchange", ["all", 1, None])
def test_an_exchange_that_is_none(group: Any, exchange: Any) -> None:
    x, y = pair_of(3)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="exchange: expected one of"):
            loss(x, y, group=group, exchange=exchange)
        with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
            loss(x, y, group=3)


def test_a_ring_has_no_rows_of_all_keys(group: Any) -> None:
    x, y = pair_of(3)
    with pytest.raises(ValueError, match="positives: expected a pair of ids with exchange='ring'"):
        neglog.info_nce(
            x, y, positives=torch.eye(3, dtype=torch.bool), group=group, exchange="ring"
        )


def test_labels_that_are_names_mean_nothing_elsewhere(group: Any) -> None:
    x, _ = pair_of(3)
    with pytest.raises(TypeError, match="labels: expected a Tensor of integers with group"):
        neglog.sup_con(x, ["a", "b", "a"], group=group)


@pytest.mark.parametrize("kind", [neglog.nn.CLIPLoss, neglog.nn.SigLIPLoss, neglog.nn.InfoNCELoss])
def test_a_module_with_a_group_is_copied(group: Any, kind: Any) -> None:
    module = kind(group=group, exchange="ring")
    made = copy.deepcopy(torch.nn.Sequential(module))[0]
    assert made is not module
    assert made.group is group
    assert made.exchange == "ring"
