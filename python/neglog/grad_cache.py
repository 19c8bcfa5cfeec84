"""cached_step: the gradient of a large batch's loss by an encoder that sees small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


def cached_step(
    encode: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor]],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int = 64,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Tensor:
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
    chunks = [
        _Chunk(encoder, part)
        for encoder, given in zip(encoders, inputs, strict=True)
        for part in _split(given, chunk_size)
    ]
    counts = [max(1, -(-_rows(given) // chunk_size)) for given in inputs]
    embeddings = _joined([chunk.first() for chunk in chunks], counts)
    value = loss(*embeddings)
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a function that returns a Tensor of shape [], got {got}")
    backward(value)
    gradients = [
        part for embedding in embeddings for part in _gradient(embedding).split(chunk_size)
    ]
    for index, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        later = any(other.encode is chunk.encode for other in chunks[index + 1 :])
        chunk.second(gradient, synchronise=not later)
    return value.detach()


def _encoders(encode: Any, count: int) -> list[Callable[[Any], Tensor]]:
    """One for each input."""
    alone = callable(encode) and not isinstance(encode, torch.nn.ModuleList)
    if not alone and not isinstance(encode, Sequence | torch.nn.ModuleList):
        raise TypeError(f"encode: expected a function or several, got {type(encode).__name__}")
    encoders = [encode] * count if alone else list(encode)
    if len(encoders) != count:
        raise ValueError(f"encode: expected {count}, one an input, got {len(encoders)}")
    return encoders


class _Random(NamedTuple):
    """Where the generators stood."""

    cpu: Tensor
    devices: list[int]
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _Random:
        # All of them: the encoder may move its input to any.
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        states = [torch.cuda.get_rng_state(device) for device in devices]
        return cls(torch.get_rng_state(), devices, states)

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


class _Chunk:
    """Some rows of one input, and the random numbers their first run drew."""

    def __init__(self, encode: Callable[[Any], Tensor], part: Any) -> None:
        self.encode = encode
        self.part = part

    def first(self) -> Tensor:
        self.random = _Random.now()
        with torch.no_grad():
            made = self.encode(self.part)
        if not isinstance(made, Tensor):
            raise TypeError(f"encode: expected a Tensor of embeddings, got {type(made).__name__}")
        if not made.dtype.is_floating_point:
            raise RuntimeError(f"encode: expected floating-point embeddings, got {made.dtype}")
        if made.dim() < 1 or len(made) != _rows(self.part):
            raise RuntimeError(
                f"encode: expected {_rows(self.part)} embeddings, got {list(made.shape)}"
            )
        return made

    def second(self, gradient: Tensor, synchronise: bool) -> None:
        apart: AbstractContextManager = nullcontext()
        if not synchronise and hasattr(self.encode, "no_sync"):
            apart = self.encode.no_sync()
        with torch.random.fork_rng(devices=self.random.devices), apart:
            self.random.set()
            made = self.encode(self.part)
            if made.requires_grad:  # a frozen tower has nothing to learn
                made.backward(gradient)


def _joined(parts: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Leaves that gather the gradient of each input's embeddings."""
    leaves, start = [], 0
    for count in counts:
        leaves.append(torch.cat(parts[start : start + count]).requires_grad_())
        start += count
    return leaves


def _gradient(embedding: Tensor) -> Tensor:
    return torch.zeros_like(embedding) if embedding.grad is None else embedding.grad


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, list | tuple) and given:
        return [tensor for part in given for tensor in _tensors(part)]
    raise TypeError(
        f"inputs: expected tensors, or dicts or lists of them, got {type(given).__name__}"
    )


def _rows(given: Any) -> int:
    return len(_tensors(given)[0])


def _split(given: Any, size: int) -> list[Any]:
    """Parts of up to `size` rows, each built as the whole is."""
    rows = _rows(given)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(given)):
        raise ValueError(
            "inputs: expected tensors that require no grad, as the encoder runs twice; detach() "
            "them, or let the encoder make them"
        )
    if any(tensor.dim() < 1 or len(tensor) != rows for tensor in _tensors(given)):
        shapes = [list(tensor.shape) for tensor in _tensors(given)]
        raise ValueError(f"inputs: expected tensors with one number of rows, got shapes {shapes}")
    return [_part(given, slice(start, start + size)) for start in range(0, max(1, rows), size)]


def _part(given: Any, rows: slice) -> Any:
    if isinstance(given, Tensor):
        return given[rows]
    if isinstance(given, Mapping):
        parts = {name: _part(value, rows) for name, value in given.items()}
        try:  # a tokenizer's BatchEncoding has names for its entries, which an encoder may use
            return type(given)(parts)  # type: ignore[call-arg]
        except TypeError:  # as of a defaultdict, which is not made of its entries
            return parts
    listed = [_part(value, rows) for value in given]
    return type(given)(*listed) if hasattr(given, "_fields") else type(given)(listed)
