"""siglip: the sum over all pairs of -log sigmoid(+-score), whose scores never lie in memory whole.

neglog::siglip            the loss and, where wanted, its gradients, formed tile by tile
neglog::siglip_backward   those gradients times the upstream, in the inputs' dtypes; itself
                          differentiable

Shapes: query (N, D), key (M, D); scale and bias () in the accumulation dtype; positive (N,) int64,
the column of each row's positive. Returned: loss () and gradients of query, key, scale and bias,
(0,) where not wanted. Three matmuls in all: the upstream is one number, so a tile's gradient is
known as soon as the tile is.

Source: arXiv:2303.15343.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog.ops.nll import library, new_memory, real_dtype
from neglog.ops.nll_autograd import as_function
from neglog.ops.pairs import Sums, Workspace, tiles_of
from neglog.ops.pairs_autograd import second_derivative
from neglog.ops.pairs_tile import CpuTiles, CudaTiles, Pairs, Tiles

GRADIENTS = 4
library.define(
    "siglip(Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor positive, int workspace, "
    "str backend, bool[4] wanted) -> (Tensor loss, Tensor grad_query, Tensor grad_key, "
    "Tensor grad_scale, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "siglip_backward(Tensor grad, Tensor query, Tensor key, Tensor scale, Tensor bias, "
    "Tensor positive, Tensor grad_query, Tensor grad_key, Tensor grad_scale, Tensor grad_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def siglip(*arguments: Any) -> Tensor:
    """The loss; arguments as the op's."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return FunctionalSigLIP.apply(*arguments)[0]
    return torch.ops.neglog.siglip.default(*arguments)[0]


def _forward(
    kind: Tiles, query, key, scale, bias, positive, workspace, backend, wanted
) -> tuple[Tensor, ...]:
    pairs = Pairs(
        query, key, scale, bias, positive, None, None, None, False, False, workspace, backend
    ).ready()
    tiles = kind("siglip", pairs, False)
    sums = Sums(pairs, wanted[0] or wanted[2], wanted[1])
    loss, slopes = (query.new_zeros(len(query), dtype=torch.float64) for _ in range(2))
    place = Workspace(pairs, None)
    for down, across in tiles_of(pairs):
        similarity = place.filled(down, across)
        tiles.sigmoid(similarity, down, across, loss, slopes)
        sums.add(similarity, down, across)
    if not len(query) or not len(key):
        sums.by_row.zero_()
        sums.by_column.zero_()
    formed = sums.finished([*wanted[:3]], 1.0, pairs.real)
    of_bias = slopes.sum() if wanted[3] else slopes.new_empty(0)
    return loss.sum().to(pairs.real), *formed, of_bias.to(pairs.real)


def _times_upstream(grad, query, key, scale, bias, positive, *formed) -> tuple[Tensor, ...]:
    return tuple(
        torch.mul(kept, grad, out=new_memory(kept.shape, kept, x.dtype))
        for kept, x in zip(formed, (query, key, scale, bias), strict=True)
    )


for _kind, _key in ((CpuTiles, "CPU"), (CudaTiles, "CUDA")):
    library.impl("siglip", partial(_forward, _kind), _key)
    library.impl("siglip_backward", _times_upstream, _key)


@torch.library.register_fake("neglog::siglip", lib=library)
def _siglip_fake(query, key, scale, bias, positive, workspace, backend, wanted):
    real = real_dtype(query.dtype)
    return (
        query.new_empty((), dtype=real),
        *(
            query.new_empty(like.shape if want else 0, dtype=real)
            for like, want in zip((query, key, scale, bias), wanted, strict=True)
        ),
    )


@torch.library.register_fake("neglog::siglip_backward", lib=library)
def _siglip_backward_fake(grad, query, key, scale, bias, positive, *formed):
    likes = (query, key, scale, bias)
    return tuple(
        torch.empty_like(kept, dtype=x.dtype) for kept, x in zip(formed, likes, strict=True)
    )


# Autograd


def composite(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, positive: Tensor) -> Tensor:
    """The loss in torch's own functions, with the scores in memory."""
    scores = (query @ key.t()).to(scale.dtype) * scale + bias
    own = torch.arange(key.shape[0], device=key.device) == positive[:, None]
    sign = 2.0 * own.to(scale.dtype) - 1.0
    return -F.logsigmoid(sign * scores).sum()


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _backward(ctx, grad, *undefined):
    if grad is None:
        return (None,) * 8
    if torch._C._are_functorch_transforms_active():
        made = FunctionalBackward.apply(grad, *ctx.saved_tensors)
    else:
        made = torch.ops.neglog.siglip_backward.default(grad, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad[:GRADIENTS]
    kept = (one if want else None for one, want in zip(made, wanted, strict=True))
    return (*kept, None, None, None, None)


def _setup_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])


def _double_backward(ctx, *grads):
    grad, *inputs, positive = ctx.saved_tensors

    def forward(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (composite(query, key, scale, bias, positive),)

    (of_grad,), of_inputs = second_derivative(forward, [grad], tuple(inputs), grads)
    return (of_grad, *of_inputs, None, None, None, None, None)


torch.library.register_autograd("neglog::siglip", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd(
    "neglog::siglip_backward", _double_backward, setup_context=_setup_backward, lib=library
)

FunctionalSigLIP = as_function(
    "FunctionalSigLIP", torch.ops.neglog.siglip.default, _setup, _backward
)
FunctionalBackward = as_function(
    "FunctionalBackward", torch.ops.neglog.siglip_backward.default, _setup_backward,
    _double_backward,
)  # fmt: skip
