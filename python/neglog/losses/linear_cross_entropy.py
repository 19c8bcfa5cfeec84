"""linear_cross_entropy: validation, and the choice between tiles and logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import dispatch
from neglog.checks import (
    autocast_dtype,
    check_extensions,
    check_index_dtype,
    check_linear,
    check_linear_target,
    check_options,
    check_weight,
    number_on,
    rows_of_last_axis,
    under_autocast,
)
from neglog.losses.cross_entropy import (
    REDUCTIONS,
    LossStats,
    by_row,
    cross_entropy,
    masked_cross_entropy,
)
from neglog.ops.linear_nll_autograd import linear_nll, rounded
from neglog.ops.nll import real_dtype
from neglog.tiles import gemm, plan

# Logits, in numbers, up to which they are made in memory: 8 MB of float32, where the fixed cost of
# tiles is still felt (512 x 64 x 1000 took 1.3 times torch's time).
FEW = 1 << 21
TORCH_OPTIONS: Any = getattr(torch.nn, "LinearCrossEntropyOptions", ())  # new in torch 2.13


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    mask: Tensor | None = None,
    shift: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without its logits.

    Rows of logits are made, turned into their gradient and used up a tile at a time, in a workspace
    of fixed size; rows that do not count are left out before the first gemm. With "mean" and
    "sum" the gradients are formed in the forward: 3 matmuls in all; with "none", 4.

    Args:
        input: (..., in_features).
        linear_weight: (C, in_features), or (C, d1, ..., dK, in_features) for an input
            (N, in_features), whose logits are (N, C, d1, ..., dK).
        target: class indices (...), or (N, d1, ..., dK); or probabilities of the logits' shape.
        linear_bias: linear_weight's shape without in_features.
        weight, reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: None means -100; not with probabilities.
        options: None, a dict of the options below, or a torch.nn.LinearCrossEntropyOptions, which
            changes nothing here.
        mask: bool, broadcast to the targets' shape (...): True where a position counts.
        shift: position t of the next to last axis is held against target t + 1, as causal language
            models are trained; the last position does not count, and "none" is one shorter.
        logit_scale, softcap, z_loss, num_items, backend: as in `cross_entropy`.
        return_stats: LossStats(loss, logsumexp, correct, entropy); all 0 where a row is ignored.

    Options:
        workspace_mb: megabytes for the logits of one tile; otherwise NEGLOG_WORKSPACE_MB, else 64,
            on CUDA 1024. In bfloat16 a single tile for all rows may have besides it the memory of
            the float32 sum of linear_weight's gradient, which it makes needless.
        filter_eps: number, or "auto" for a 32nd of the dtype's eps (2**-12 in bfloat16). The
            gradients of a tile of rows against a class are left out if each is smaller than
            filter_eps times g, the largest gradient of any row's loss (1 / divisor for "mean").
            So the gradient of input row i is wrong by less than filter_eps * g times the sum of
            the norms of linear_weight's rows left out, that of linear_weight's row c by less than
            filter_eps * g times the sum of the norms of the inputs; linear_bias has no error, nor
            has the loss. Worth it for a trained model only. Default 0: nothing is left out.

    Probabilities, a K-dimensional linear_weight, few logits and devices without kernels take the
    ordinary way: the logits are made in memory. Where gradients are formed in the forward the first
    backward has their memory; a second through the same graph (retain_graph) runs the forward anew.

    Raises:
        As `cross_entropy`, and RuntimeError for in_features, linear_bias or mask that do not fit.

    Source: torch.nn.functional.linear_cross_entropy; arXiv:2411.09009 for the idea.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy, (input, linear_weight, target, linear_bias, weight), input,
            linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options, mask=mask,
            shift=shift, logit_scale=logit_scale, softcap=softcap, z_loss=z_loss,
            num_items=num_items, return_stats=return_stats, backend=backend,
        )  # fmt: skip
    check_options(-100 if ignore_index is None else ignore_index, reduction, label_smoothing)
    check_linear(input, linear_weight, linear_bias, target)
    check_extensions(reduction, logit_scale, softcap, z_loss, num_items)
    workspace, filter_eps = _tile_options(options, input)
    if torch.compiler.is_compiling() and isinstance(logit_scale, Tensor):  # no number for an op
        input, logit_scale = input * logit_scale.to(input.dtype), 1.0
    head, dtype = (input, linear_weight, linear_bias), autocast_dtype(input)
    common: dict[str, Any] = {
        "weight": weight, "reduction": reduction, "label_smoothing": label_smoothing,
        "logit_scale": logit_scale, "softcap": softcap, "z_loss": z_loss, "num_items": num_items,
        "return_stats": return_stats, "backend": backend,
    }  # fmt: skip
    if linear_weight.dim() > 2:
        return _of_many_dimensions(rounded(head, dtype), target, ignore_index, mask, shift, common)
    positions = list(input.shape[:-1])
    check_linear_target(positions, [*positions, linear_weight.shape[0]], target, mask, shift)
    if target.dim() == input.dim():  # one more than the positions
        return _of_probabilities(rounded(head, dtype), target, ignore_index, mask, shift, common)
    ignored = -100 if ignore_index is None else ignore_index
    labels = _labels(target, mask, shift, ignored)
    if filter_eps == "auto":
        filter_eps = torch.finfo(dtype).eps / 32
    tile_options = (workspace, float(filter_eps))
    result = _of_labels(head, labels.reshape(-1), ignored, tile_options, common)

    def in_place_of_targets(x: Tensor) -> Tensor:
        x = x.view(positions)
        return x[..., :-1] if shift else x

    return by_row(result, in_place_of_targets, reduction)


def _tile_options(options: Any, input: Tensor) -> tuple[int, float | str]:
    """Bytes of the workspace, and filter_eps as given."""
    if options is None or isinstance(options, TORCH_OPTIONS):
        options = {}
    if not isinstance(options, dict) or not set(options) <= {"workspace_mb", "filter_eps"}:
        raise TypeError(
            "options: expected None, a dict of 'workspace_mb' and 'filter_eps', or a "
            f"torch.nn.LinearCrossEntropyOptions, got {options!r}"
        )
    filter_eps = options.get("filter_eps", 0.0)
    if filter_eps != "auto" and not (isinstance(filter_eps, (int, float)) and 0 <= filter_eps < 1):
        raise ValueError(f"filter_eps: expected 'auto' or 0 <= number < 1, got {filter_eps!r}")
    default = plan.CUDA_WORKSPACE_MB if input.is_cuda else plan.DEFAULT_WORKSPACE_MB
    return plan.workspace_bytes(options.get("workspace_mb"), default), filter_eps


def _labels(target: Tensor, mask: Tensor | None, shift: bool, ignored: int) -> Tensor:
    """The class that each position is held against; `ignored` where there is none."""
    check_index_dtype(target)
    target = target.long()  # a byte cannot hold `ignored`
    if mask is not None:
        target = torch.where(mask, target, ignored)
    if shift:  # the input stays as it lies: only its labels move
        last = torch.full_like(target[..., :1], ignored)
        target = torch.cat([target[..., 1:], last], -1)
    return target


def _of_labels(
    head: tuple, labels: Tensor, ignored: int, tile_options: tuple[int, float], common: dict
) -> Any:
    """Rows against their labels, by tiles if a kernel can and it is worth it."""
    input, linear_weight, linear_bias = head
    given = rows_of_last_axis(input)
    rows = given.to(autocast_dtype(given))
    weight, backend = common["weight"], dispatch.forced(common["backend"])
    if weight is not None:
        check_weight(weight, linear_weight.shape[0], rows)
    refusal = dispatch.kernels_refuse(rows, weight, backend)
    refusal = refusal or dispatch.kernels_refuse(linear_weight, backend=backend)
    if backend not in (None, "torch") and refusal:
        raise RuntimeError(f"backend={backend!r} cannot take this call: {refusal}")
    by_torch = bool(refusal) or backend == "torch"
    if backend is None and not refusal:
        by_torch = not dispatch.kernel_backend(rows) or gemm.few(rows, linear_weight, FEW)
    if by_torch:
        counted = labels != ignored
        if not _all_seen(counted):  # what does not count may be NaN
            rows = torch.where(counted[:, None], rows, 0)
        logits = F.linear(*rounded((rows, linear_weight, linear_bias), rows.dtype))
        result = cross_entropy(logits, labels, ignore_index=ignored, **common)
        return _without_ignored(result, counted)
    common = common | {"backend": backend or ""}
    head = (given, linear_weight, linear_bias)
    return _tiled(head, rows.dtype, labels, ignored, tile_options, common)


def _all_seen(counted: Tensor) -> bool:
    """Whether every position counts, where to ask does not wait for a device or break a graph."""
    readable = counted.is_cpu and not torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active() or type(counted) is not Tensor
    return readable and not transformed and bool(counted.all())


def _without_ignored(result: Any, counted: Tensor) -> Any:
    """Statistics as the tiles give them, which make no logits of ignored rows."""
    if not isinstance(result, LossStats):
        return result
    _, lse, correct, entropy = result
    return LossStats(
        result.loss, torch.where(counted, lse, 0), correct, torch.where(counted, entropy, 0)
    )


def _tiled(
    head: tuple, dtype: torch.dtype, labels: Tensor, ignored: int,
    tile_options: tuple[int, float], common: dict,
) -> Any:  # fmt: skip
    rows = head[0]
    real = real_dtype(dtype)
    weight, num_items, reduction = common["weight"], common["num_items"], common["reduction"]
    if weight is not None:
        weight = weight.to(real)
    if num_items is not None:
        num_items = number_on(num_items, real, rows.device).reshape(())
    # The upstream of "none" is not known yet, so its gradients wait for the backward.
    early = torch.is_grad_enabled() and reduction != "none"
    wanted = [early and part is not None and part.requires_grad for part in head]
    loss, lse, correct, entropy = linear_nll(
        head, dtype, labels.long(), weight, num_items,
        REDUCTIONS["mean" if num_items is not None else reduction], ignored,
        float(common["label_smoothing"]), float(common["logit_scale"]),
        float(common["softcap"] or 0.0), float(common["z_loss"]), common["return_stats"], wanted,
        *tile_options, common["backend"],
    )  # fmt: skip
    loss = loss.to(real if under_autocast(rows) else dtype)
    return LossStats(loss, lse, correct, entropy) if common["return_stats"] else loss


def _of_probabilities(
    head: tuple, target: Tensor, ignore_index: int | None, mask: Tensor | None, shift: bool,
    common: dict,
) -> Any:  # fmt: skip
    """A distribution for each position is as large as the logits, which are made beside it."""
    _refuse_ignore_index(ignore_index)
    input, linear_weight, linear_bias = head
    if shift:
        mask = None if mask is None else mask.expand(input.shape[:-1])[..., 1:]
        input, target = input[..., :-1, :], target[..., 1:, :]
    logits = F.linear(input, linear_weight, linear_bias)
    if mask is not None:
        return masked_cross_entropy(logits, target, mask, **common)
    result = cross_entropy(rows_of_last_axis(logits), rows_of_last_axis(target), **common)
    shape = logits.shape[:-1]
    return by_row(result, lambda x: x.view(shape), common["reduction"])


def _of_many_dimensions(
    head: tuple, target: Tensor, ignore_index: int | None, mask: Tensor | None, shift: bool,
    common: dict,
) -> Any:  # fmt: skip
    """Logits (N, C, d1, ..., dK)."""
    for name, given in (("mask", mask is not None), ("shift", shift)):
        if given:
            raise RuntimeError(f"{name}: expected none with a K-dimensional linear_weight")
    input, linear_weight, linear_bias = head
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, flat, bias).view(input.shape[0], *linear_weight.shape[:-1])
    if target.shape == logits.shape:
        _refuse_ignore_index(ignore_index)
    ignored = -100 if ignore_index is None else ignore_index
    return cross_entropy(logits, target, ignore_index=ignored, **common)


def _refuse_ignore_index(ignore_index: int | None) -> None:
    if ignore_index is not None:
        raise RuntimeError(
            f"ignore_index: expected none with class probabilities as target, got {ignore_index}"
        )
