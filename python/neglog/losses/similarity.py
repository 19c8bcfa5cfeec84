"""The log-sum-exp of each query's similarities, of which contrastive losses are made."""

from __future__ import annotations

from torch import Tensor

from neglog import route
from neglog.checks_of_pairs import check_comparison, check_groups, extremes
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import compare, embeddings, scale_of, workspace_of
from neglog.losses._types import Backend, WorkspaceOptions


def similarity_logsumexp(
    query: Tensor, key: Tensor, temperature: float | Tensor = 0.1, *,
    positive: Tensor | None = None, excluded: Tensor | None = None,
    query_ids: Tensor | None = None, key_ids: Tensor | None = None, normalize: bool = True,
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """logsumexp_j <query_i, key_j> / temperature, without the matrix of similarities.

    For losses that `info_nce` does not have: several kinds of keys in one softmax (`logaddexp` of
    their results), keys of other processes, or weights of one's own. The loss of a query is this
    less the score of its positive. It is differentiable, twice too.

    Args:
        query: (N, D).
        key: (M, D), of the query's dtype and device.
        temperature: what similarities are divided by: a number, a tensor () or (N,); the tensor
            receives a gradient.
        positive: (N,) integers: the column of each query's positive, which is never left out for
            its id. Of the keys of all processes it is an offset plus the row.
        excluded: (N,) integers: a column that its query leaves out, such as itself; -1 for none.
        query_ids, key_ids: (N,) and (M,) integers: pairs of one id are left out, such as documents
            of the same query. Both or neither.
        normalize: similarities are cosines; False: dot products. 16-bit embeddings are normalised
            in float32.
        options: {"workspace_mb": number}, the budget for similarities; otherwise
            NEGLOG_WORKSPACE_MB, else 256.
        backend: "cython", "numba", "cuda" or "torch"; None lets neglog.route choose.

    Returns:
        (N,), float64 of float64 embeddings, else float32: a loss is a small difference from it.
        -inf where all keys are left out.

    Raises:
        RuntimeError for shapes, dtypes and devices that do not fit, ValueError for values,
        TypeError for types, IndexError for a column that no key has.

    Source: arXiv:1807.03748, the denominator of its equation 4.
    """
    given = (query, key, temperature, positive, excluded, query_ids, key_ids)
    if any_distributed(*given):
        return on_whole_tensors(similarity_logsumexp, locals())
    check_comparison(
        temperature, "none", normalize, per_sample=True, same_rows=False, query=query, key=key
    )
    _check_columns("positive", positive, query, key, lowest=0)
    _check_columns("excluded", excluded, query, key, lowest=-1)
    _check_ids(query_ids, key_ids, query, key)
    z, keys = embeddings(query, normalize), embeddings(key, normalize)
    where = route.choose(z, keys, backend=backend, workspace=workspace_of(options))
    compared = compare(
        where, z, keys, scale_of(temperature, z), positive=_long(positive),
        excluded=_long(excluded), query_group=_long(query_ids), key_group=_long(key_ids),
    )  # fmt: skip
    return compared.row_lse


def _long(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.long()


def _check_columns(
    name: str, columns: Tensor | None, query: Tensor, key: Tensor, lowest: int
) -> None:
    """One for each query, of those that there are. On a device they are not read."""
    if columns is None:
        return
    check_groups(name, columns, query)
    for value in extremes(columns):
        if not lowest <= value < key.shape[0]:
            raise IndexError(
                f"{name}: expected columns from {lowest} to {key.shape[0] - 1}, got {value:g}"
            )


def _check_ids(
    query_ids: Tensor | None, key_ids: Tensor | None, query: Tensor, key: Tensor
) -> None:  # fmt: skip
    if (query_ids is None) != (key_ids is None):
        missing, other = ("query_ids", "key_ids")[:: 1 if query_ids is None else -1]
        raise ValueError(f"{missing}: expected integers, as {other} are given, got None")
    if query_ids is not None:
        check_groups("query_ids", query_ids, query)
        check_groups("key_ids", key_ids, key)
