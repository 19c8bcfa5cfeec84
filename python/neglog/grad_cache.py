"""cached_step: the gradient of a large batch's loss by an encoder that sees small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Encoder: TypeAlias = Callable[[Any], Tensor]


def cached_step(
    encode: Encoder | Sequence[Encoder] | torch.nn.ModuleList, inputs: Sequence[Any],
    loss: Callable[..., Tensor], *, chunk_size: int = 64,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:  # fmt: skip
    """Loss of the whole batch, and its gradients added to every `.grad`; the optimizer comes next.

        loss = neglog.cached_step(encoder, (first, second), neglog.info_nce)
        optimizer.step()

    The encoder runs without a graph, chunk by chunk; then the loss runs on all embeddings; then the
    encoder runs again, chunk by chunk, with the random numbers of its first run (those of torch's
    own generators), and each chunk's gradient goes into it. So the gradient is that of the whole
    batch, at the memory of one chunk and the time of one forward more. A layer that looks at its
    batch, such as BatchNorm, sees chunks, and updates its statistics twice.

    Args:
        encode: module or function from a chunk of an input to embeddings (chunk, D); or a sequence
            of them, one for each input.
        inputs: for each argument of `loss`, a tensor, or a dict, list or tuple of tensors (such as
            a tokenizer's), with the batch first.
        loss: from all embeddings, (N, D) each, to a tensor (). Its own parameters, such as a
            temperature, receive their gradients too.
        chunk_size: rows of an input that the encoder sees at once.
        backward: what is called with the loss; with a GradScaler
            `lambda loss: scaler.scale(loss).backward()`.

    Returns the loss, detached. A DistributedDataParallel encoder reduces its gradients once.

    Raises TypeError and ValueError for inputs that do not fit, and RuntimeError for an encoder that
    does not give one embedding a row.

    Source: arXiv:2101.06983 (GradCache).
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence) or not inputs:
        raise TypeError(
            "inputs: expected a sequence with one input for each argument of loss, "
            f"got {type(inputs).__name__}"
        )
    if not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    encoders = _encoders(encode, len(inputs))
    parts = [_split(given, chunk_size) for given in inputs]
    chunks = [
        [_Chunk(encoder, part) for part in some]
        for encoder, some in zip(encoders, parts, strict=True)
    ]
    # Leaves that gather the gradient of each input's embeddings.
    embeddings = [torch.cat([chunk.first() for chunk in some]).requires_grad_() for some in chunks]
    value = loss(*embeddings)
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a function that returns a Tensor of shape [], got {got}")
    backward(value)
    runs = [chunk for some in chunks for chunk in some]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings]
    gradients = [part for grad in grads for part in grad.split(chunk_size)]
    for index, (chunk, gradient) in enumerate(zip(runs, gradients, strict=True)):
        later = any(other.encode is chunk.encode for other in runs[index + 1 :])
        chunk.second(gradient, synchronise=not later)
    return value.detach()


def _encoders(encode: Any, count: int) -> list[Encoder]:
    """One for each input."""
    alone = callable(encode) and not isinstance(encode, torch.nn.ModuleList)
    if not alone and not isinstance(encode, Sequence | torch.nn.ModuleList):
        raise TypeError(f"encode: expected a function or several, got {type(encode).__name__}")
    encoders = [encode] * count if alone else list(encode)
    if len(encoders) != count:
        raise ValueError(f"encode: expected {count}, one an input, got {len(encoders)}")
    return encoders


class _Chunk:
    """Some rows of one input, and the state of the generators before their first run."""

    def __init__(self, encode: Encoder, part: Any) -> None:
        self.encode, self.part = encode, part

    def first(self) -> Tensor:
        # Of all devices, as the encoder may move its input to any: get_device_states of
        # torch.utils.checkpoint takes the state of the input's device alone.
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.cpu = torch.get_rng_state()
        with torch.no_grad():
            made = self.encode(self.part)
        if not isinstance(made, Tensor):
            raise TypeError(f"encode: expected a Tensor of embeddings, got {type(made).__name__}")
        if not made.dtype.is_floating_point:
            raise RuntimeError(f"encode: expected floating-point embeddings, got {made.dtype}")
        rows = len(_tensors(self.part)[0])
        if made.dim() < 1 or len(made) != rows:
            raise RuntimeError(f"encode: expected {rows} embeddings, got {list(made.shape)}")
        return made

    def second(self, gradient: Tensor, synchronise: bool) -> None:
        apart = nullcontext() if synchronise else getattr(self.encode, "no_sync", nullcontext)()
        with torch.random.fork_rng(devices=range(len(self.cuda))), apart:
            torch.set_rng_state(self.cpu)
            torch.cuda.set_rng_state_all(self.cuda)
            made = self.encode(self.part)
            if made.requires_grad:  # a frozen tower has nothing to learn
                made.backward(gradient)


def _leaves(given: Any) -> Iterator[Any]:
    for leaf in tree_leaves(given):
        if isinstance(leaf, Mapping):  # of a type that torch does not know, such as BatchEncoding
            yield from _leaves(dict(leaf))
        else:
            yield leaf


def _tensors(given: Any) -> list[Tensor]:
    leaves = list(_leaves(given)) or [given]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            got = type(leaf).__name__
            raise TypeError(f"inputs: expected tensors, or dicts or lists of them, got {got}")
    return leaves


def _split(given: Any, size: int) -> list[Any]:
    """Parts of up to `size` rows, each built as the whole is."""
    tensors = _tensors(given)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "inputs: expected tensors that require no grad, as the encoder runs twice; detach() "
            "them, or let the encoder make them"
        )
    if any(tensor.dim() < 1 or len(tensor) != len(tensors[0]) for tensor in tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(f"inputs: expected tensors with one number of rows, got shapes {shapes}")
    starts = range(0, max(1, len(tensors[0])), size)
    return [_rows_of(given, slice(start, start + size)) for start in starts]


def _rows_of(given: Any, rows: slice) -> Any:
    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[rows]
        parts = _rows_of(dict(leaf), rows)
        try:  # a tokenizer's BatchEncoding has names for its entries, which an encoder may use
            return type(leaf)(parts)
        except TypeError:  # a type that is not made of its entries
            return parts

    return tree_map(part, given)
