"""sentence-transformers' ranking losses by neglog's kernels: no matrix of similarities.

    from neglog.integrations.sentence_transformers import MultipleNegativesRankingLoss

`MultipleNegativesRankingLoss` and `CachedMultipleNegativesRankingLoss` are subclasses of
sentence-transformers' own, with their constructors, configuration and citation, and take their
place in SentenceTransformerTrainer and around other losses (MatryoshkaLoss). Only the step from
embeddings to loss is another. Where that step has no kernel, as of a similarity_fct of one's own,
it is sentence-transformers' and a warning says so.

Source: sentence_transformers/sentence_transformer/losses of sentence-transformers 6.2.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import neglog
from neglog.losses._pairs import dots, embeddings

try:
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("sentence_transformers"):
        raise
    raise ImportError(
        "neglog.integrations.sentence_transformers needs sentence-transformers 6: "
        "pip install 'neglog[sentence-transformers]'"
    ) from error

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """sentence-transformers' loss of the same name, without its matrices of similarities.

    Constructor and inputs are theirs. similarity_fct is `util.cos_sim` or `util.dot_score`; with
    another, and for embeddings that are no dense floating-point matrices, the loss is computed by
    sentence-transformers, and a warning says so.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2 or not _has_kernel(self, embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' loss of the same name: they cache the gradients of the embeddings
    (GradCache), and the loss of the whole batch is neglog's, without chunks of a matrix."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss.__class__ = MultipleNegativesRankingLoss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *,
        with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        whole = [torch.cat(parts) for parts in reps]
        if not _has_kernel(self, whole):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = ranking_loss(self, whole)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def _has_kernel(loss: Any, given: list[Tensor]) -> bool:
    known = loss.similarity_fct in (cos_sim, dot_score)
    dense = all(x.layout == torch.strided and x.dim() == 2 for x in given)
    if known and dense and all(x.is_floating_point() for x in given):
        return True
    what = "embeddings that are no dense matrices"
    if not known:
        what = f"similarity_fct={getattr(loss.similarity_fct, '__name__', loss.similarity_fct)!r}"
    warnings.warn(
        f"neglog has no kernel for {what}: the loss is computed by sentence-transformers",
        stacklevel=3,
    )
    return False


# The loss


def ranking_loss(loss: Any, given: list[Tensor]) -> Tensor:
    """The loss (), float32 or float64. `loss` has the options, `given` is queries and documents."""
    batch = _Batch(loss, given)
    if batch.pairs_alone and not batch.hardness:
        symmetric = {"query_to_doc", "doc_to_query"} == set(loss.directions)
        symmetric = symmetric and loss.partition_mode == "per_direction"
        if symmetric or set(loss.directions) == {"query_to_doc"}:
            return neglog.info_nce(
                batch.query, batch.document, temperature=1 / batch.scale, symmetric=symmetric,
                normalize=False,
            )  # fmt: skip
    of_direction = torch.stack([DIRECTIONS[name](batch) for name in loss.directions])
    if loss.partition_mode == "joint":
        normalizer = torch.logsumexp(of_direction, 0)
    else:
        normalizer = of_direction.mean(0)
    return (normalizer - batch.positive_score()).mean()


class _Batch:
    """Embeddings as they are multiplied. `all_*` are those of all processes.

    query, document: (N, D), this process's, and each its positive.
    all_queries: (W N, D); all_documents: (W N (1 + negatives), D), the positives first.
    own: (N,), the place of this process's rows among the queries.
    """

    def __init__(self, loss: Any, given: list[Tensor]) -> None:
        rows, offset = given[0].shape[0], 0
        self.scale = loss.scale
        self.pairs_alone = len(given) == 2 and not loss.gather_across_devices
        self.hardness = loss.hardness_strength if loss.hardness_mode else 0.0
        self.hardness_mode = loss.hardness_mode
        # sentence-transformers compares embeddings of 16 bits in float32.
        wide = [x.float() if x.dtype.itemsize == 2 else x for x in given]
        ready = [embeddings(x, loss.similarity_fct is cos_sim) for x in wide]
        if loss.gather_across_devices:
            ready = [all_gather_with_grad(x) for x in ready]
            offset = get_rank() * rows
        self.all_queries, *documents = ready
        self.own = torch.arange(offset, offset + rows, device=given[0].device)
        self.all_documents = torch.cat(documents) if len(documents) > 1 else documents[0]
        self.query = self.all_queries[offset : offset + rows]
        # (1 + negatives) of (N, D): the query's own documents
        self.own_documents = [x[offset : offset + rows] for x in documents]
        self.document = self.own_documents[0]
        self.ids = torch.arange(len(self.all_queries), device=self.own.device).repeat(
            len(documents)
        )

    def positive_score(self) -> Tensor:
        return self.scale * dots(self.query, self.document)

    def logsumexp(self, query: Tensor, key: Tensor, scale: float, **left_out: Any) -> Tensor:
        return neglog.similarity_logsumexp(query, key, 1 / scale, normalize=False, **left_out)

    def own_left_out(self) -> dict[str, Tensor]:
        """All documents of the query's own."""
        return {"query_ids": self.own, "key_ids": self.ids}


def _query_to_doc(batch: _Batch) -> Tensor:
    if not batch.hardness:
        return batch.logsumexp(batch.query, batch.all_documents, batch.scale)
    return HARDNESS[batch.hardness_mode](batch)


def _query_to_query(batch: _Batch) -> Tensor:
    return batch.logsumexp(batch.query, batch.all_queries, batch.scale, excluded=batch.own)


def _doc_to_query(batch: _Batch) -> Tensor:
    return batch.logsumexp(batch.document, batch.all_queries, batch.scale)


def _doc_to_doc(batch: _Batch) -> Tensor:
    left_out = batch.own_left_out()
    return batch.logsumexp(batch.document, batch.all_documents, batch.scale, **left_out)


DIRECTIONS = {
    "query_to_doc": _query_to_doc,
    "query_to_query": _query_to_query,
    "doc_to_query": _doc_to_query,
    "doc_to_doc": _doc_to_doc,
}

# Hardness: a negative's score is scale * s + strength * s, of which the second has no gradient
# (arXiv:2503.04812). So its gradient is scale / (scale + strength) of that of the whole.


class _Weighed(torch.autograd.Function):
    """Its argument, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.weight, None


def _hard(batch: _Batch, **left_out: Any) -> Tensor:
    """Of the documents that are not left out, each of them hard."""
    total = batch.scale + batch.hardness
    weight = batch.scale / total
    query, key = (_Weighed.apply(x, weight) for x in (batch.query, batch.all_documents))
    return batch.logsumexp(query, key, total, **left_out)


def _hard_in_batch(batch: _Batch) -> Tensor:
    """The documents of other queries are hard, one's own are not."""
    own = [batch.scale * dots(batch.query, x) for x in batch.own_documents]
    return torch.logsumexp(torch.stack([_hard(batch, **batch.own_left_out()), *own]), 0)


def _hard_negatives(batch: _Batch) -> Tensor:
    """One's own negatives are hard."""
    others = batch.logsumexp(
        batch.query, batch.all_documents, batch.scale, positive=batch.own, **batch.own_left_out()
    )
    own = [dots(batch.query, x) for x in batch.own_documents[1:]]
    hard = [batch.scale * score + batch.hardness * score.detach() for score in own]
    return torch.logsumexp(torch.stack([others, *hard]), 0)


def _all_hard(batch: _Batch) -> Tensor:
    """All but one's own positive."""
    return torch.logaddexp(_hard(batch, excluded=batch.own), batch.positive_score())


HARDNESS = {
    "in_batch_negatives": _hard_in_batch,
    "hard_negatives": _hard_negatives,
    "all_negatives": _all_hard,
}
