"""Contrastive losses over processes: the mean of losses and gradients is that of the whole batch.

Each argument with a row for each query or key is cut into unlike parts, one for each process, and
one process computes the loss of the whole.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import neglog
from neglog import dispatch
from tests.support import ranks
from tests.support.backends import BEST

FEATURES = 5
ROWS = (3, 5, 2, 4)  # of each process
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def normal(rows: int, *more: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *(more or (FEATURES,)), generator=generator, dtype=torch.float64)


def integers(rows: int, seed: int, high: int = 4) -> Tensor:
    return torch.randint(0, high, (rows,), generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """A call on the whole batch of `rows` queries. What `parts` names is cut: by the queries of
    each process ("rows"), or by what else each has."""

    function: str
    arguments: dict[str, Any]
    parts: dict[str, tuple[int, ...]]
    learned: tuple[str, ...]
    views: int = 1  # results a query


def two(function: str, rows: tuple[int, ...], *names: str, **options: Any) -> Case:
    total = sum(rows)
    arguments = {name: normal(total, seed=at) for at, name in enumerate(names)}
    arguments = {name: torch.nn.functional.normalize(x, dim=1) for name, x in arguments.items()}
    parts, learned = dict.fromkeys(names, rows), list(names)
    for name, value in options.items():
        if callable(value):
            value, of_ranks = value(rows)
            parts |= {name: of_ranks} if of_ranks else {}
        arguments[name] = value
        if isinstance(value, Tensor) and value.is_floating_point() and name in LEARNED:
            learned.append(name)
    views = 2 if function in ("nt_xent", "dcl") else 1
    return Case(function, arguments, parts, tuple(learned), views)


LEARNED = ("logit_scale", "logit_bias", "temperature", "negative_keys")


def by_row(make: Any, *given: Any, **options: Any) -> Any:
    return lambda rows: (make(sum(rows), *given, **options), rows)


def further(make: Any, *given: Any, **options: Any) -> Any:
    """Of further keys, of which a process has one more than queries."""

    def made(rows: tuple[int, ...]) -> Any:
        more = tuple(n + 1 for n in rows)
        return make(sum(more), *given, **options), more

    return made


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def temperatures(rows: int) -> Tensor:
    return normal(rows, 1, seed=7).abs()[:, 0] + 0.3


def pair_of_ids(rows: tuple[int, ...]) -> Any:
    return (integers(sum(rows), 1), integers(sum(rows), 2)), rows


def mask(rows: tuple[int, ...]) -> Any:
    total = sum(rows)
    return normal(total, total, seed=3) > 0.7, rows


def rows_of_keys(rows: tuple[int, ...]) -> Any:
    total = sum(rows)
    chosen = torch.randint(-1, total, (total, 3), generator=torch.Generator().manual_seed(4))
    return chosen, rows


def paired(rows: tuple[int, ...]) -> Any:
    return normal(sum(rows), 4, FEATURES, seed=8), rows


def cases(rows: tuple[int, ...]) -> dict[str, Case]:
    image = ("image_features", "text_features")
    pairs = ("query", "positive_key")
    views = ("z_i", "z_j")
    scale, hot = number(7.0), number(0.3)
    negatives = {"negative_keys": further(normal, seed=9), "negative_mode": "in_batch"}
    found = {
        "clip": two("clip_loss", rows, *image, logit_scale=scale),
        "clip, ids": two("clip_loss", rows, *image, logit_scale=scale, exclude=by_row(integers, 5)),
        "clip, bias": two("clip_loss", rows, *image, logit_scale=3.0, logit_bias=number(1.0)),
        "siglip": two("siglip_loss", rows, *image, logit_scale=scale, logit_bias=number(-2.0)),
        "siglip, ids": two(
            "siglip_loss", rows, *image, logit_scale=scale, logit_bias=None,
            exclude=by_row(integers, 5),
        ),
        "sup_con": two("sup_con", rows, "features", labels=by_row(integers, 6)),
        "sup_con, pairs": two("sup_con", rows, "features", labels=by_row(integers, 6, high=9)),
        "sup_con, views": views_of_samples(rows),
    }  # fmt: skip
    for name in ("nt_xent", "dcl"):
        found[name] = two(name, rows, *views, temperature=hot)
        found[f"{name}, ids"] = two(name, rows, *views, exclude=by_row(integers, 5, high=6))
    options: dict[str, dict[str, Any]] = {
        "": {"temperature": hot},
        "dot products": {"temperature": 2.0, "normalize": False},
        "temperatures": {"temperature": by_row(temperatures)},
        "symmetric": {"symmetric": True, "temperature": hot},
        "symmetric, smoothed": {"symmetric": True, "label_smoothing": 0.1},
        "ids": {"exclude": by_row(integers, 5, high=6)},
        "smoothed": {"label_smoothing": 0.2, "temperature": hot},
        "queue": {"negative_keys": further(normal, seed=9), "temperature": hot},
        "queue, ids": {
            "negative_keys": further(normal, seed=9), "exclude": by_row(integers, 5),
            "negative_ids": further(integers, 6),
        },
        "queue, weight": {
            "negative_keys": further(normal, seed=9), "label_smoothing": 0.1,
            "hard_negative_weight": further(temperatures),
        },
        "in batch": negatives | {"temperature": hot},
        "in batch, ids": negatives | {"exclude": by_row(integers, 5)},
        "in batch, weight, smoothed": negatives
        | {"hard_negative_weight": 0.3, "label_smoothing": 0.1},
        "own negative": {
            "negative_keys": by_row(normal, seed=9), "negative_mode": "in_batch",
            "own_negative_weight": 0.4, "label_smoothing": 0.1,
        },
        "paired": {"negative_keys": paired, "negative_mode": "paired", "temperature": hot},
        "positives by ids": {"positives": pair_of_ids, "temperature": hot},
        "positives by ids, symmetric": {"positives": pair_of_ids, "symmetric": True},
        "positives by ids, in batch": negatives | {"positives": pair_of_ids},
        "positives by mask": {"positives": mask},
        "positives by mask, symmetric": {"positives": mask, "symmetric": True},
        "positives by rows": {"positives": rows_of_keys},
        "positives by rows, symmetric": {"positives": rows_of_keys, "symmetric": True},
    }  # fmt: skip
    return found | {
        f"info_nce, {name}": two("info_nce", rows, *pairs, **o) for name, o in options.items()
    }


def views_of_samples(rows: tuple[int, ...]) -> Case:
    features = normal(sum(rows), 2, FEATURES, seed=1)
    return Case("sup_con", {"features": features}, {"features": rows}, ("features",))


NOT_BY_RING = ("by mask", "by rows")
NAMES = tuple(cases(ROWS))


def cut(x: Any, of_ranks: tuple[int, ...], rank: int) -> Any:
    if isinstance(x, tuple):
        return tuple(cut(one, of_ranks, rank) for one in x)
    start = sum(of_ranks[:rank])
    return x[start : start + of_ranks[rank]]


def outcome(
    case: Case, given: dict[str, Any], options: dict[str, Any], upstream: Tensor | None = None
) -> tuple[Any, dict[str, Tensor]]:
    given = dict(given)
    for name in case.learned:
        given[name] = given[name].detach().clone().requires_grad_()
    result = getattr(neglog, case.function)(**given, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    total = loss if upstream is None else (loss * upstream).sum()
    leaves = [given[name] for name in case.learned]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return result, dict(zip(case.learned, grads, strict=True))


def to(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def whole_and_part(name: str, rank: int, world: int, dtype: torch.dtype) -> Any:
    case = cases(ROWS[:world])[name]
    given = to(dtype, case.arguments)
    part = {
        key: cut(x, case.parts[key], rank) if key in case.parts else x for key, x in given.items()
    }
    return case, given, part


def near(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.double() - expected.double()).abs().max() if found.numel() else 0
    size = 1 + (expected.double().abs().max() if expected.numel() else 0)
    assert error <= TOLERANCE[expected.dtype] * size, f"{what}: off by {error} of {size}"


def mean_is_the_whole(
    name: str, exchange: str, reduction: str, dtype: torch.dtype, backend: str, rank: int,
    world: int,
) -> None:  # fmt: skip
    case, given, part = whole_and_part(name, rank, world, dtype)
    options = {} if case.function in ("clip_loss", "siglip_loss") else {"reduction": reduction}
    if case.function == "siglip_loss":
        options = {}
    expected, whole = outcome(case, given, options)
    with dispatch.record() as ran:
        found, grads = outcome(
            case,
            part,
            {**options, "group": dist.group.WORLD, "exchange": exchange, "backend": backend},
        )
    assert any(x.endswith(f":{backend}") for x in ran) or "paired" in name, ran
    loss = found.detach().clone()
    dist.all_reduce(loss)
    near(loss / world, expected.detach(), "loss")
    share = 1 / world if exchange == "detached" else 1  # what the mean of gradients is too small by
    for key, grad in grads.items():
        if key in case.parts:
            near(grad / world, cut(whole[key], case.parts[key], rank) * share, key)
        else:
            grad = grad.clone()
            dist.all_reduce(grad)
            near(grad / world, whole[key], key)


def rows_are_the_whole(name: str, exchange: str, backend: str, rank: int, world: int) -> None:
    """Losses and statistics of rows, and an upstream for each."""
    case, given, part = whole_and_part(name, rank, world, torch.float64)
    options: dict[str, Any] = {"reduction": "none"}
    if case.function == "info_nce":
        options["return_stats"] = True
    expected, _ = outcome(case, given, options, torch.ones((), dtype=torch.float64))
    first = expected if isinstance(expected, Tensor) else expected.loss
    rows, views = ROWS[:world], case.views

    def own(x: Tensor) -> Tensor:
        return torch.cat([cut(view, rows, rank) for view in x.chunk(views)])

    upstream = normal(first.shape[0], *first.shape[1:] or (1,), seed=11).view(first.shape)
    _, whole = outcome(case, given, options, upstream)
    options |= {"group": dist.group.WORLD, "exchange": exchange, "backend": backend}
    found, grads = outcome(case, part, options, own(upstream))
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for x, y in pairs:
        near(x.detach(), own(y.detach()).to(torch.float64), "rows")
    if exchange == "detached":
        return
    for key, grad in grads.items():
        if key in case.parts:
            near(grad, cut(whole[key], case.parts[key], rank), key)
        else:
            dist.all_reduce(grad)
            near(grad, whole[key], key)


def checks(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        for exchange in ("gather", "ring", "detached"):
            if exchange == "ring" and any(x in name for x in NOT_BY_RING):
                continue
            for backend in (BEST, "torch"):
                if backend == "torch" and (exchange == "detached" or world != 2):
                    continue
                for reduction in ("mean", "sum"):
                    if reduction == "sum" and (world != 3 or "lip" in name):
                        continue
                    found[f"{name}, {exchange}, {reduction}, {backend}"] = partial(
                        mean_is_the_whole, name, exchange, reduction, torch.float64, backend
                    )
                if "lip" not in name and "symmetric" not in name and world == 3:
                    found[f"{name}, {exchange}, none, {backend}"] = partial(
                        rows_are_the_whole, name, exchange, backend
                    )
            if world == 2 and exchange != "detached":
                found[f"{name}, {exchange}, float32"] = partial(
                    mean_is_the_whole, name, exchange, "mean", torch.float32, BEST
                )
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def said(request, tmp_path_factory):
    world = request.param
    return ranks.run(
        checks(world), world, tmp_path_factory.mktemp("ranks"), seconds=300, one_group=True
    )


def test_the_whole_batch(said):
    failed = {name: next(x for x in each if x) for name, each in said.items() if any(each)}
    assert not failed, f"{len(failed)} of {len(said)}: " + "\n".join(
        f"{name}: {error[-600:]}" for name, error in list(failed.items())[:6]
    )
