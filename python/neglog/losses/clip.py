"""The losses of image and text pairs: CLIP's softmax and SigLIP's sigmoids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neglog import availability, route, torch_state
from neglog.checks_of_pairs import check_embeddings, check_finite, check_groups, check_scalar
from neglog.distributed import check_alike, check_group, gathered
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._pairs import compare, embeddings, number, workspace_of
from neglog.losses._result import reduce_and_cast
from neglog.losses._types import Backend, WorkspaceOptions
from neglog.ops.pairs import autograd, formula
from neglog.ops.pairs.schema import Pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None, *, exclude: Tensor | None = None,
    group: ProcessGroup | None = None, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
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
            and its texts against all images, with gradients back to all. The mean over processes,
            as DistributedDataParallel takes it of gradients, is then the loss of the whole batch.
            None, as dist.group.WORLD is until init_process_group(): this process alone.
        options, backend: as in `info_nce`.

    The same loss is `info_nce` with symmetric=True, temperature 1 / logit_scale and
    normalize=False. It has `label_smoothing` and `return_stats`, and `positives`, of which each
    counts; but no `group`.

    Source: arXiv:2103.00020; the arguments are those of open_clip's ClipLoss.
    """
    if any_distributed(image_features, text_features, logit_scale, logit_bias, exclude):
        return on_whole_tensors(clip_loss, locals())
    _check(image_features, text_features, logit_scale, logit_bias, exclude, group)
    image, text = (embeddings(x, False) for x in (image_features, text_features))
    where = route.choose(image, text, backend=backend, workspace=workspace_of(options))
    scale = number(logit_scale, image)
    if group is not None:
        check_alike(image, exclude, group)
    own, of_all = _groups(exclude, group)
    if group is not None:
        losses = [
            _of_processes(where, *sides, scale, own, of_all, group)
            for sides in ((image, text), (text, image))
        ]
    else:
        rows = torch.arange(image.shape[0], device=image.device)
        compared = compare(
            where, image, text, scale, positive=rows, query_group=own, key_group=of_all,
            columns=True,
        )  # fmt: skip
        losses = [compared.row_loss, compared.column_loss]
    loss = torch.stack(losses).mean()
    if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
        # A gradient of 0, as torch's formula has it: DistributedDataParallel waits for one. inf * 0
        # would be NaN.
        loss = loss + 0 * number(logit_bias, image).nan_to_num(0, 0, 0)
    return reduce_and_cast(loss, "none", image_features)


def _of_processes(
    where: route.Route, query: Tensor, key: Tensor, scale: Tensor, own: Tensor | None,
    of_all: Tensor | None, group: Any,
) -> Tensor:  # fmt: skip
    """Losses of this process's queries against the keys of all processes."""
    keys, first = gathered(key, group)
    positive = torch.arange(query.shape[0], device=query.device) + first
    return compare(
        where, query, keys, scale, positive=positive, query_group=own, key_group=of_all
    ).row_loss


def _groups(exclude: Tensor | None, group: Any) -> tuple[Tensor | None, Tensor | None]:
    """Of this process's rows, and of those that they are compared with."""
    if exclude is None:
        return None, None
    own = exclude.long()
    return own, own if group is None else gathered(own, group)[0]


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None, *, exclude: Tensor | None = None,
    group: ProcessGroup | None = None, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """-log sigmoid of each pair's score, negated where image and text do not belong; sum over / N.

    Arguments as `clip_loss`; logit_bias is added to the scores and receives a gradient; None adds
    nothing. A pair of two rows with one id in `exclude` leaves the sum.

    Source: arXiv:2303.15343; the arguments are those of open_clip's SigLipLoss.
    """
    if any_distributed(image_features, text_features, logit_scale, logit_bias, exclude):
        return on_whole_tensors(siglip_loss, locals())
    _check(image_features, text_features, logit_scale, logit_bias, exclude, group)
    logit_bias = 0.0 if logit_bias is None else logit_bias
    check_finite("logit_bias", logit_bias)
    image, text = (embeddings(x, False) for x in (image_features, text_features))
    where = route.choose(image, text, backend=backend, workspace=workspace_of(options))
    positive = torch.arange(image.shape[0], device=image.device)
    if group is not None:
        check_alike(image, exclude, group)
        text, first = gathered(text, group)
        positive = positive + first
    learned = (image, text, number(logit_scale, image), number(logit_bias, image))
    given = (*learned, positive, *_groups(exclude, group), *where.for_op())
    if where.backend == "torch":
        availability.ran("pairs_sigmoid", "torch")
        total = formula.sigmoid(Pairs.of_sigmoid(*given))
    else:
        learns = torch.is_grad_enabled() and not torch_state.jit_tracing()
        wanted = [learns and x.requires_grad for x in learned]
        total = autograd.sigmoid(*given, wanted).loss
    return reduce_and_cast(total / image.shape[0], "sum", image_features)


def _check(
    image: Any, text: Any, logit_scale: Any, logit_bias: Any, exclude: Any, group: Any
) -> None:
    check_embeddings(image_features=image, text_features=text)
    check_scalar("logit_scale", logit_scale, image)
    check_finite("logit_scale", logit_scale)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias, image)
    if exclude is not None:
        check_groups("exclude", exclude, image)
    if group is not None:
        check_group(group)
