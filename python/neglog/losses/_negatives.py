"""Which keys are negatives of a query in info_nce, and what is added to their scores."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from neglog.checks import check_flags, number_on, shown
from neglog.checks_of_pairs import (
    check_embeddings,
    check_finite,
    check_groups,
    check_integers,
    check_real,
    check_real_dtype,
    check_scalar,
    check_shape,
    extremes,
)
from neglog.distributed.exchange import gather_rows
from neglog.losses._positives import check_positives, numbered
from neglog.losses._together import Together, of_all
from neglog.losses._types import NegativeMode

NEGATIVE_MODES = get_args(NegativeMode)


class Negatives(NamedTuple):
    """The arguments of info_nce about negatives, as it takes them."""

    keys: Any
    mode: str
    exclude: Any
    ids: Any
    weight: Any
    own_weight: Any

    @property
    def in_batch(self) -> bool:
        """Whether the other rows' positives are negatives."""
        return self.keys is None or self.mode == "in_batch"

    @property
    def paired(self) -> bool:
        return self.keys is not None and self.mode == "paired"

    @property
    def weighs_all(self) -> bool:
        return isinstance(self.weight, Tensor) or self.weight != 0

    @property
    def weighs_own(self) -> bool:
        return isinstance(self.own_weight, Tensor) or self.own_weight != 0

    def bias(self, plain: Any, scale: Tensor) -> Tensor | None:
        """What is added to the scores of `plain` columns, 0, and then of those of the keys."""
        if not self.weighs_all:
            return None
        value = number_on(self.weight, scale.dtype, scale.device)
        return torch.cat([scale.new_zeros(plain), value.expand(self.keys.shape[0])])

    def groups(self, together: Together | None) -> tuple[Tensor | None, Tensor | None]:
        """Of the queries, and of what they are compared with: equal where no negative is."""
        if self.exclude is None:
            return None, None
        columns = None if together is None else together.columns
        own = self.exclude.long()
        if self.keys is None:
            return own, of_all(own, columns)
        if self.ids is not None:
            ids = self.ids.long()
            block = ids if self.mode == "unpaired" else torch.cat([own, ids])
            return own, of_all(block, columns)
        # These keys belong to nobody. Any integer may be an id, and so none could stand for that.
        if together is None:
            own = numbered(own)
        else:
            own = numbered(gather_rows(own, together.queries.rows, together.queries.name))
            own = own[together.queries.own]
        block = torch.cat([own, own.new_full((self.keys.shape[0],), -1)])
        return own, of_all(block, columns)


# Checks


def check_negatives(
    given: Negatives, query: Tensor, positive_key: Tensor, positives: Any, symmetric: Any,
    reduction: str, label_smoothing: float, exchange: str | None = None,
) -> None:  # fmt: skip
    """exchange: of a call over processes."""
    check_flags(symmetric=symmetric)
    if given.mode not in NEGATIVE_MODES:
        raise ValueError(f"negative_mode: expected one of {NEGATIVE_MODES}, got {given.mode!r}")
    if given.keys is not None:
        _check_keys(given, query, symmetric)
    _check_weight_of_all(given)
    _check_own_weight(given, query)
    if given.exclude is not None:
        check_groups("exclude", given.exclude, query)
    if given.ids is not None:
        _check_ids(given, query)
    without_ids = given.ids is None and not given.in_batch
    if given.exclude is not None and (label_smoothing or without_ids):
        raise ValueError(
            "exclude: expected none with label_smoothing, nor with 'unpaired' or 'paired' "
            "negatives without negative_ids"
        )
    if positives is None:
        return
    check_positives(positives, query, positive_key, exchange)
    if not given.in_batch:
        raise ValueError(
            "positives: expected negative_keys None or negative_mode 'in_batch', "
            f"got {given.mode!r}"
        )
    if given.exclude is not None:
        raise ValueError("exclude: expected none with positives, which say what is no negative")
    if symmetric and reduction == "none":
        raise ValueError(
            "reduction: expected 'mean' or 'sum' with symmetric and positives, got 'none': queries "
            "and keys need not be as many"
        )


def _check_keys(given: Negatives, query: Tensor, symmetric: bool) -> None:
    keys = given.keys
    if symmetric:
        raise ValueError("symmetric: expected False with negative_keys, which have no queries")
    if given.mode != "paired":
        check_embeddings(False, query=query, negative_keys=keys)
    elif not isinstance(keys, Tensor):
        raise TypeError(f"negative_keys: expected a Tensor, got {type(keys).__name__}")
    elif keys.dim() != 3 or keys.shape[::2] != query.shape:
        raise RuntimeError(
            f"negative_keys: expected shape ({query.shape[0]}, M, {query.shape[1]}) for 'paired', "
            f"got {list(keys.shape)}"
        )
    else:
        check_embeddings(False, query=query, negative_keys=keys.flatten(0, 1))


def _check_weight_of_all(given: Negatives) -> None:
    name, weight = "hard_negative_weight", given.weight
    if not isinstance(weight, Tensor):
        check_real(name, weight)
    if given.weighs_all and given.keys is None:
        raise ValueError(f"{name}: expected 0 without negative_keys, got {_described(weight)}")
    if isinstance(weight, Tensor):
        _check_weight(name, weight, _shapes(given, []))
    for value in extremes(weight):
        if not value < torch.inf:
            raise ValueError(f"{name}: expected numbers below inf, got {shown(value)}")


def _shapes(given: Negatives, *further: list[int]) -> list[list[int]]:
    """That a number for each negative key may have."""
    shapes = [*further, [given.keys.shape[-2]]]
    return [*shapes, list(given.keys.shape[:2])] if given.paired else shapes


def _check_weight(name: str, weight: Tensor, shapes: list[list[int]]) -> None:
    check_shape(name, weight, shapes)
    check_real_dtype(name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected no gradient; detach() it")


def _check_own_weight(given: Negatives, query: Tensor) -> None:
    name, weight = "own_negative_weight", given.own_weight
    if isinstance(weight, Tensor):
        _check_weight(name, weight, [[]])
    else:
        check_scalar(name, weight, query)
    check_finite(name, weight)
    if not given.weighs_own:
        return
    if given.keys is None or given.mode != "in_batch":
        raise ValueError(
            f"{name}: expected 0 without negative_keys and negative_mode 'in_batch', "
            f"got {_described(weight)}"
        )
    if given.keys.shape[0] != query.shape[0]:
        raise RuntimeError(
            f"negative_keys: expected {query.shape[0]} rows, one a query, with {name}, "
            f"got {list(given.keys.shape)}"
        )


def _described(weight: Any) -> Any:
    return "a Tensor" if isinstance(weight, Tensor) else weight


def _check_ids(given: Negatives, query: Tensor) -> None:
    if given.keys is None or given.exclude is None:
        missing = "negative_keys" if given.keys is None else "exclude, the ids of the rows"
        raise ValueError(f"negative_ids: expected none without {missing}")
    check_integers("negative_ids", given.ids, query)
    check_shape("negative_ids", given.ids, _shapes(given))
