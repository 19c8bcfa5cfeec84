"""The losses of image and text pairs: CLIP's softmax and SigLIP's sigmoids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neglog import availability, route, torch_state
from neglog.checks_of_pairs import check_embeddings, check_finite, check_groups, check_scalar
from neglog.distributed import sigmoid as group_sigmoid
from neglog.distributed.exchange import gather_rows
from neglog.distributed.groups import Ranks
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import Columns, compare, embeddings, number, workspace_of
from neglog.losses._result import reduce_and_cast
from neglog.losses._together import (
    Together,
    arguments_of,
    check_exchange,
    meet,
    of_all,
    on_constants,
    own_columns,
    reduced,
)
from neglog.losses._types import Backend, Exchange, WorkspaceOptions
from neglog.ops.pairs import autograd, formula
from neglog.ops.pairs.schema import Pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BY_ROW = ("image_features", "text_features", "exclude")


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None, *, exclude: Tensor | None = None,
    group: ProcessGroup | None = None, exchange: Exchange = "gather",
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """The mean of cross-entropy from images to texts and from texts to images.

    Args:
        image_features, text_features: (N, D), compared by dot product: normalise them first.
        logit_scale: what similarities are multiplied by; a tensor () receives a gradient.
        logit_bias: changes nothing, as in open_clip: a number added to all logits leaves softmax. A
            tensor receives a gradient of 0.
        exclude: (N,) integers: pairs with the same one are no negatives of each other, such as
            images with one caption. With `group` they are compared over all processes.
        group: a torch.distributed process group: this process's images against the texts of all,
            and its texts against all images. Processes may have unlike numbers of rows. Loss and
            gradients are such that their mean over processes, as DistributedDataParallel takes it,
            is that of the whole batch. None, as dist.group.WORLD is until init_process_group():
            this process alone.
        exchange: how texts come to the images of other processes. "gather": all at once; their
            gradients go back. "ring": some rows at a time go round, and no process holds all.
            "detached": each process computes the whole batch's loss, with the others' features for
            constants, as open_clip does by default; the mean of gradients over processes is then
            the whole batch's over their number.
        options, backend: as in `info_nce`.

    The same loss is `info_nce` with symmetric=True, temperature 1 / logit_scale and
    normalize=False. It has `label_smoothing` and `return_stats`, and `positives`, of which each
    counts.

    Source: arXiv:2103.00020; the arguments are those of open_clip's ClipLoss.
    """
    if any_distributed(image_features, text_features, logit_scale, logit_bias, exclude):
        return on_whole_tensors(clip_loss, locals())
    _check(image_features, text_features, logit_scale, logit_bias, exclude, group, exchange)
    if group is not None and exchange == "detached":
        given = arguments_of(clip_loss, locals())
        return on_constants(clip_loss, group, given, BY_ROW, "image_features")
    image, text = (embeddings(x, False) for x in (image_features, text_features))
    where = route.choose(image, text, backend=backend, workspace=workspace_of(options))
    scale = number(logit_scale, image)
    together = _meet("clip_loss", group, exchange, where, image, text, logit_scale, None, exclude)
    ranks = None if together is None else together.keys
    own = None if exclude is None else exclude.long()
    compared = compare(
        where, image, text, scale, positive=own_columns(image, ranks), query_group=own,
        key_group=of_all(own, ranks), columns=True,
        over=None if together is None else Columns(together.keys, exchange),
    )  # fmt: skip
    loss = (compared.row_loss + compared.column_loss) / 2
    return reduced(beside_bias(loss, logit_bias, image), "mean", image_features, ranks)


def beside_bias(loss: Tensor, bias: Any, like: Tensor) -> Tensor:
    """The loss, with a gradient of 0 to the bias, as torch's formula has it:
    DistributedDataParallel waits for one. inf * 0 would be NaN."""
    if isinstance(bias, Tensor) and bias.requires_grad:
        return loss + 0 * number(bias, like).nan_to_num(0, 0, 0)
    return loss


def _meet(
    call: str, group: Any, exchange: str, where: route.Route, image: Tensor, text: Tensor,
    scale: Any, bias: Any, exclude: Tensor | None,
) -> Together | None:  # fmt: skip
    return meet(
        call, group, exchange, where, image, learned=(text, scale, bias), logit_scale=scale,
        logit_bias=bias, exclude=exclude is not None,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None, *, exclude: Tensor | None = None,
    group: ProcessGroup | None = None, exchange: Exchange = "gather",
    options: WorkspaceOptions | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """-log sigmoid of each pair's score, negated where image and text do not belong; sum over / N.

    Arguments as `clip_loss`, but that images alone meet the texts of all processes; logit_bias is
    added to the scores and receives a gradient; None adds nothing. A pair of two rows with one id
    in `exclude` leaves the sum.

    Source: arXiv:2303.15343; the arguments are those of open_clip's SigLipLoss.
    """
    if any_distributed(image_features, text_features, logit_scale, logit_bias, exclude):
        return on_whole_tensors(siglip_loss, locals())
    _check(image_features, text_features, logit_scale, logit_bias, exclude, group, exchange)
    logit_bias = 0.0 if logit_bias is None else logit_bias
    check_finite("logit_bias", logit_bias)
    if group is not None and exchange == "detached":
        given = arguments_of(siglip_loss, locals())
        return on_constants(siglip_loss, group, given, BY_ROW, "image_features")
    image, text = (embeddings(x, False) for x in (image_features, text_features))
    where = route.choose(image, text, backend=backend, workspace=workspace_of(options))
    together = _meet(
        "siglip_loss", group, exchange, where, image, text, logit_scale, logit_bias, exclude
    )
    ranks = None if together is None else together.keys
    own = None if exclude is None else exclude.long()
    learned = (image, text, number(logit_scale, image), number(logit_bias, image))
    of_rows = (own_columns(image, ranks), own, of_all(own, ranks))
    if ranks is not None and exchange == "ring" and where.backend != "torch":
        total = group_sigmoid.forward(*learned, *of_rows, *where.for_op(), ranks.rows, ranks.name)
    else:
        total = _sum_of_sigmoids(where, learned, of_rows, ranks)
    divisor, world = (image.shape[0], 1) if ranks is None else (ranks.total, ranks.world)
    return reduce_and_cast(total * world / divisor, "sum", image_features)


def _sum_of_sigmoids(
    where: route.Route, learned: tuple[Tensor, ...], of_rows: tuple[Any, ...], ranks: Ranks | None
) -> Tensor:
    """Of this process's images with all texts, in its memory."""
    image, text, *numbers = learned
    if ranks is not None:
        text = gather_rows(text, ranks.rows, ranks.name)
    learned = (image, text, *numbers)
    if where.backend == "torch":
        availability.ran("pairs_sigmoid", "torch")
        return formula.sigmoid(Pairs.of_sigmoid(*learned, *of_rows, *where.for_op()))
    learns = torch.is_grad_enabled() and not torch_state.jit_tracing()
    wanted = [learns and x.requires_grad for x in learned]
    return autograd.sigmoid(*learned, *of_rows, *where.for_op(), wanted).loss


def _check(
    image: Any, text: Any, logit_scale: Any, logit_bias: Any, exclude: Any, group: Any,
    exchange: Any,
) -> None:  # fmt: skip
    check_embeddings(image_features=image, text_features=text)
    check_scalar("logit_scale", logit_scale, image)
    check_finite("logit_scale", logit_scale)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias, image)
    if exclude is not None:
        check_groups("exclude", exclude, image)
    check_exchange(group, exchange)
