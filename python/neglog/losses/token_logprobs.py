"""token_logprobs: what a trainer of policies asks of a language model, for each of its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import route
from neglog.checks import (
    check_extensions,
    check_index_target,
    check_linear,
    check_temperature,
    rows_of_last_axis,
    to_ignore_index,
    to_logits_dtype,
)
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._rows import RowOptions, rows_by_op
from neglog.losses._types import Backend, LogitsDtype, TileOptions
from neglog.losses.linear_cross_entropy import (
    labels_of,
    logits_in_memory,
    rows_by_tiles,
    scaled_head,
    tile_options,
)
from neglog.ops.nll.autograd import Rows
from neglog.torch_state import autocast_dtype


class TokenLogprobs(NamedTuple):
    """Of each position, in the shape of the target; 0 or False where one does not count.

    With z = softcap * tanh(logit_scale * logits / softcap) / temperature and p = softmax(z):

    logprob: log p[target].
    entropy: -sum(p * log p), in nats.
    logsumexp: log(sum(e^z)).
    argmax: the class of the largest z, the first of equal ones; int64.
    correct: whether the target is the argmax; bool.

    The first three are float32, or float64 for float64 logits, and differentiable.
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    argmax: Tensor
    correct: Tensor


def token_logprobs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = 1.0,
    mask: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    backend: Backend | None = None,
) -> TokenLogprobs:  # fmt: skip
    """Log-probability of each target under softmax(logits), and the entropy of that softmax.

    One read of the logits in the forward and one in the backward, whatever has a gradient. The
    gradient of a position is, for upstream a of its logprob, b of its entropy and c of its
    logsumexp, H its entropy and [t] 1 at the target,

        a ([t] - p) - b p (log p + H) + c p

    Args:
        logits: (..., C), float32, float64, bfloat16 or float16. They are computed with in float32,
            float64 logits in float64.
        target: class indices (...), int64 or uint8.
        temperature: above 0; divides the scores, after the softcap. Without gradient.
        mask: bool, broadcast to (...): True where a position counts.
        shift: position t of the last axis of the target is held against target t + 1, and the
            results are one shorter.
        ignore_index: positions with this target do not count. Their gradient is exactly zero, even
            where their logits are NaN.
        logit_scale, softcap, backend: as in `cross_entropy`.

    Returns:
        TokenLogprobs(logprob, entropy, logsumexp, argmax, correct).

    Raises:
        IndexError: a target is out of range; logits is a scalar.
        ValueError: temperature or softcap not above 0, an unknown backend.
        RuntimeError: other shapes, dtypes or devices.
        TypeError: logits, target or mask is no tensor, an option not of its type.
    """
    if any_distributed(logits, target, mask, logit_scale, temperature):
        return on_whole_tensors(token_logprobs, locals())
    if has_torch_function_variadic(logits, target, mask):
        return handle_torch_function(
            token_logprobs, (logits, target, mask), logits, target, temperature=temperature,
            mask=mask, shift=shift, ignore_index=ignore_index, logit_scale=logit_scale,
            softcap=softcap, backend=backend,
        )  # fmt: skip
    ignored = to_ignore_index(ignore_index)
    check_index_target(logits, target, mask, shift)
    options = _options(logits, ignored, temperature, logit_scale, softcap)
    where = route.choose(logits, backend=backend)
    labels = labels_of(target, mask, shift, ignored)
    rows = rows_by_op(where, rows_of_last_axis(logits), labels.flatten(), None, options)
    return _by_position(rows, labels, ignored, shift)


def linear_token_logprobs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, mask: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    options: TileOptions | None = None, logits_dtype: LogitsDtype = None,
    backend: Backend | None = None,
) -> TokenLogprobs:  # fmt: skip
    """token_logprobs(linear(input, linear_weight, linear_bias), target), without its logits.

    Positions that do not count are left out before the first matmul. Logits are made a tile at a
    time, in the forward and again in the backward: 4 matmuls in all.

    Args:
        input: hidden states (..., in_features).
        linear_weight: (C, in_features). linear_bias: (C,).
        target, temperature, mask, shift, ignore_index: as in `token_logprobs`.
        logit_scale, softcap, options, logits_dtype, backend: as in `linear_cross_entropy`.

    Returns:
        TokenLogprobs(logprob, entropy, logsumexp, argmax, correct).

    Raises:
        As `token_logprobs`, and RuntimeError for an in_features or linear_bias that does not fit.
    """
    if any_distributed(input, linear_weight, target, linear_bias, mask, logit_scale, temperature):
        return on_whole_tensors(linear_token_logprobs, locals())
    tensors = (input, linear_weight, target, linear_bias, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_token_logprobs, tensors, input, linear_weight, target, linear_bias=linear_bias,
            temperature=temperature, mask=mask, shift=shift, ignore_index=ignore_index,
            logit_scale=logit_scale, softcap=softcap, options=options, logits_dtype=logits_dtype,
            backend=backend,
        )  # fmt: skip
    ignored = to_ignore_index(ignore_index)
    check_linear(input, linear_weight, linear_bias, target, mask, shift, indices=True)
    row_options = _options(input, ignored, temperature, logit_scale, softcap)
    workspace, filter_eps = tile_options(options, input)
    wide = to_logits_dtype(logits_dtype, input)
    labels = labels_of(target, mask, shift, ignored)
    counted = labels.flatten() != ignored
    head = (rows_of_last_axis(input), linear_weight, linear_bias)
    head, row_options = scaled_head(head, counted, row_options)
    dtype = autocast_dtype(input)
    where = route.choose(
        head[0].to(dtype), linear_weight, backend=backend, workspace=workspace, logits_dtype=wide
    )  # fmt: skip
    if where.backend == "torch":
        logits = logits_in_memory(head, dtype, counted, wide)
        rows = rows_by_op(where, logits, labels.flatten(), None, row_options)
    else:
        given = (where, head, dtype, labels.flatten(), None, row_options)
        rows = rows_by_tiles(*given, filter_eps)
    return _by_position(rows, labels, ignored, shift)


def _options(
    input: Tensor, ignored: int, temperature: Any, logit_scale: Any, softcap: Any
) -> RowOptions:
    """tanh(scale * x / cap) * cap / t is that of the scale and the cap both divided by t."""
    check_extensions(input, "none", logit_scale, softcap, 0.0, None)
    check_temperature(temperature, input)
    return RowOptions(
        "none", ignored, logit_scale=logit_scale / temperature,
        softcap=None if softcap is None else softcap / temperature, return_stats=True,
    )  # fmt: skip


def _by_position(rows: Rows, labels: Tensor, ignored: int, shift: bool) -> TokenLogprobs:
    skipped = labels == ignored

    def among_all(x: Tensor) -> Tensor:
        x = x.view(labels.shape).masked_fill(skipped, 0)
        return x[..., :-1] if shift else x

    return TokenLogprobs(
        among_all(-rows.loss), among_all(rows.entropy), among_all(rows.lse),
        among_all(rows.argmax), among_all(rows.correct),
    )  # fmt: skip
