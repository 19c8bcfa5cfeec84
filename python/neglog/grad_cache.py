"""cached_step: the gradient of a large batch's loss by an encoder that sees small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from neglog.checks import to_count
from neglog.distributed.data_parallel import Wrappers

Encoder: TypeAlias = Callable[[Any], Tensor]


def cached_step(
    encode: Encoder | Sequence[Encoder] | torch.nn.ModuleList, inputs: Sequence[Any],
    loss: Callable[..., Tensor], *, chunk_size: int = 64,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:  # fmt: skip
    """Loss of the whole batch, and its gradients added to every `.grad`; the optimizer comes next.
    Under torch.no_grad the loss alone.

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

    Returns the loss, detached.

    DistributedDataParallel modules that the encoder calls, itself or inside a function, reduce
    their gradients once, after the last chunk: those of parameters that the loss alone uses, too.
    Processes may have unlike numbers of chunks, unless a module waits for the others in each
    forward, as SyncBatchNorm and fully_shard do. Modules of fully_shard reduce in their last chunk.
    What else has a method no_sync is an encoder's last chunk long without it.

    Raises TypeError and ValueError for inputs that do not fit, and RuntimeError for an encoder that
    does not give one embedding a row, or other embeddings in its second run than in its first: on
    the CPU before the gradient of that chunk is added, on a device at the end, with one wait for
    it. Other chunks may have added theirs then: zero_grad() before you try again. Also where
    nothing receives a gradient, as no embedding has a graph; and for a DistributedDataParallel
    inside Join, with mixed_precision or with delay_all_reduce_named_params.

    Source: arXiv:2101.06983 (GradCache).
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence) or not inputs:
        got = "none" if isinstance(inputs, Sequence) and not inputs else type(inputs).__name__
        raise TypeError(
            f"inputs: expected a sequence with one input for each argument of loss, got {got}"
        )
    chunk_size = to_count("chunk_size", chunk_size)
    for name, function in (("loss", loss), ("backward", backward)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    encoders = _encoders(encode, len(inputs))
    parts = [_split(given, chunk_size) for given in inputs]
    chunks = [
        [_Chunk(encoder, part) for part in some]
        for encoder, some in zip(encoders, parts, strict=True)
    ]
    wrappers = Wrappers([len(some) for some in parts])
    made = [_joined([wrappers.watch(chunk.first) for chunk in some]) for some in chunks]
    if not torch.is_grad_enabled():
        return _value(loss, made).detach()
    # Leaves that gather the gradient of each input's embeddings.
    embeddings = [x.requires_grad_() for x in made]
    with wrappers.silent():
        value = _value(loss, embeddings)
        backward(value)
        learned = _second_runs(chunks, embeddings, chunk_size, wrappers)
    if not learned:
        _check_that_loss_learns(value, embeddings)
    wrappers.reduce()
    return value.detach()


def _value(loss: Callable[..., Tensor], embeddings: list[Tensor]) -> Tensor:
    value = loss(*embeddings)
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a function that returns a Tensor of shape [], got {got}")
    return value


def _joined(parts: list[Tensor]) -> Tensor:
    """The embeddings of all chunks."""
    first = parts[0]
    for part in parts:
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            raise RuntimeError(
                "encode: expected one shape and dtype of embeddings in all chunks, got "
                f"{list(first.shape)} of {first.dtype} and {list(part.shape)} of {part.dtype}"
            )
    return torch.cat(parts)


def _check_that_loss_learns(value: Tensor, embeddings: list[Tensor]) -> None:
    """Something must, as a backward asks."""
    own = set(map(id, embeddings))
    leaves = [node.variable for node in _graph(value) if hasattr(node, "variable")]
    if all(id(leaf) in own for leaf in leaves):
        raise RuntimeError(
            "encode: expected embeddings with a graph, got none that has, and a loss without "
            "parameters of its own: nothing receives a gradient. Likely causes: a function under "
            "torch.no_grad, detach(), parameters that are frozen"
        )


def _second_runs(
    chunks: list[list[_Chunk]], embeddings: list[Tensor], chunk_size: int, wrappers: Wrappers
) -> bool:
    """Every chunk again, and the gradient of its embeddings into it; whether any took one."""
    runs = [chunk for some in chunks for chunk in some]
    firsts = [part for x in embeddings for part in x.detach().split(chunk_size)]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings]
    gradients = [part for grad in grads for part in grad.split(chunk_size)]
    comparison = _Comparison()
    last = {id(chunk.encode): now for now, chunk in enumerate(runs)}
    learned: dict[int, int] = {}  # by encoder, its last chunk that had a backward
    for now, (chunk, first, gradient) in enumerate(zip(runs, firsts, gradients, strict=True)):
        ends = last[id(chunk.encode)] == now
        with wrappers.forward(now), chunk.second(synchronise=ends) as again:
            if again.requires_grad:  # a frozen tower has nothing to learn
                comparison.add(chunk.encode, first, again)
                again.backward(gradient)
                learned[id(chunk.encode)] = now
                wrappers.learned(now)
    waiting = {now for key, now in learned.items() if runs[now].apart() and now != last[key]}
    for now in sorted(waiting.union(wrappers.waiting())):
        with wrappers.forward(), runs[now].second(synchronise=True) as again:
            again.backward(torch.zeros_like(again))
    comparison.end()
    return bool(learned)


def _encoders(encode: Any, count: int) -> list[Encoder]:
    """One for each input."""
    alone = callable(encode) and not isinstance(encode, torch.nn.ModuleList)
    if not alone and not isinstance(encode, Sequence | torch.nn.ModuleList):
        raise TypeError(f"encode: expected a function or several, got {type(encode).__name__}")
    encoders = [encode] * count if alone else list(encode)
    if len(encoders) != count:
        raise ValueError(f"encode: expected {count}, one an input, got {len(encoders)}")
    for encoder in encoders:
        if not callable(encoder):
            raise TypeError(f"encode: expected functions, got {type(encoder).__name__} among them")
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

    def apart(self) -> Any:
        """no_sync of an encoder that is no DistributedDataParallel, which has its own way."""
        if isinstance(self.encode, DistributedDataParallel):
            return None
        return getattr(self.encode, "no_sync", None)

    @contextmanager
    def second(self, synchronise: bool) -> Iterator[Tensor]:
        """The embeddings again, with their graph; what uses it stands inside."""
        apart = None if synchronise else self.apart()
        with torch.random.fork_rng(devices=range(len(self.cuda))), (apart or nullcontext)():
            torch.set_rng_state(self.cpu)
            torch.cuda.set_rng_state_all(self.cuda)
            yield self.encode(self.part)


class _Comparison:
    """Of the embeddings of both runs: a gradient is that of the first only if they are the same."""

    def __init__(self) -> None:
        self.tolerance: dict[int, float] = {}  # of each encoder
        self.waiting: list[Tensor] = []  # distance and limit, on a device

    def add(self, encode: Encoder, first: Tensor, again: Tensor) -> None:
        """Raises RuntimeError, on the CPU at once, before the chunk's gradient is added."""
        if again.shape != first.shape:
            raise RuntimeError(
                f"encode: expected shape {list(first.shape)} in its second run, as in its first, "
                f"got {list(again.shape)}"
            )
        if first.is_cpu and torch.equal(first, again):
            return
        if id(encode) not in self.tolerance:
            self.tolerance[id(encode)] = _tolerance(again)
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        x, y = first.to(wide), again.detach().to(wide)
        same = (x == y) | (x.isnan() & y.isnan())
        distance = torch.linalg.vector_norm(torch.where(same, 0, x - y))
        norm = torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0))
        self.waiting.append(torch.stack([distance, self.tolerance[id(encode)] * norm, norm]))
        if first.is_cpu:
            self.end()

    def end(self) -> None:
        """Reads what waits: once, so that a device is waited for once."""
        found = torch.stack([x.double() for x in self.waiting]).tolist() if self.waiting else []
        self.waiting.clear()
        for distance, limit, norm in found:
            if not distance <= limit:  # nor NaN
                raise RuntimeError(
                    "encode: expected the embeddings of its first run again in its second, got "
                    f"others, {distance / (norm or 1):.2g} of their norm away: the gradient would "
                    "not be the loss's. Likely causes: Python's or NumPy's random numbers, a "
                    "torch.Generator of its own, spectral_norm or another module that changes "
                    "itself in forward, kernels that are not deterministic"
                )


def _tolerance(embeddings: Tensor) -> float:
    """How far apart two runs may be, as a part of the norm: half the digits of the coarsest dtype
    in the graph. With a graph and without, torch may take different kernels; dropout of 0.1 is 0.3
    of the norm."""
    eps = torch.finfo(embeddings.dtype).eps
    if not embeddings.is_cpu and embeddings.dtype == torch.float32:
        eps = 2**-10  # TF32, which torch takes for convolutions
    for node in _graph(embeddings):
        dtypes = [x.dtype for x in node._input_metadata]
        if "Compiled" in node.name():  # of what is inside nothing is known
            dtypes.append(torch.bfloat16)
        eps = max([eps, *(torch.finfo(x).eps for x in dtypes if x.is_floating_point)])
    return eps**0.5


def _graph(x: Tensor) -> Iterator[Any]:
    """The nodes that x was made by."""
    seen, nodes = set(), [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        nodes += [following for following, _ in node.next_functions]


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
