"""Memory of the ops: where results go, and the tensors and addresses that the CPU kernels want."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neglog import torch_state
from neglog.kernels.memory import large_buffer, use_huge_pages
from neglog.tiles import plan

# A tensor without memory has its offset in the storage for an address, which lies below this. Only
# a tensor that lies there is asked whether it has memory: that takes 0.2 microseconds, and most
# systems place memory above.
LOW_ADDRESS = 1 << 40


def new_memory(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty, in memory that is kept where it is large and on the CPU (kernels/memory.py).
    Its storage cannot be resized."""
    dtype = dtype or like.dtype
    count = math.prod(shape)
    buffer = large_buffer(count * dtype.itemsize) if like.is_cpu else None
    if buffer is None:
        return like.new_empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def new_gradient(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty, for the gradient of what may be a parameter: FSDP resizes its storage.

    On huge pages: the page faults are then less than a hundredth of the matmul that fills it.
    """
    made = like.new_empty(shape, dtype=dtype)
    if made.is_cpu:
        use_huge_pages(made.data_ptr(), made.nbytes)
    return made


def new_rows(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory for (rows, columns), where each row begins at a line of the cache."""
    stride = plan.row_stride(columns, dtype.itemsize)
    return new_memory((rows, stride), like, dtype)[:, :columns]


def address(tensor: Tensor | None, start: int = 0) -> int:
    """Of the number at `start`; 0 for "not given". An empty tensor has no address: it gets 1,
    which nobody reads."""
    if tensor is None:
        return 0
    first = tensor.data_ptr() or 1
    return first + start * tensor.itemsize if start else first


def aligned(tensor: Tensor, name: str) -> Tensor:
    """The tensor, where C++ can read its numbers in memory. A copy where they are not there as they
    are, or where one begins within a number, as torch.frombuffer can make it.

    Raises RuntimeError, which calls the tensor `name`, where its memory was freed.
    """
    start = tensor.data_ptr()
    if start < LOW_ADDRESS or start % tensor.itemsize or tensor.is_neg():
        return _made_readable(tensor, name)
    return tensor


def _made_readable(tensor: Tensor, name: str) -> Tensor:
    tensor = _materialized(tensor, name)
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def _materialized(tensor: Tensor, name: str) -> Tensor:
    """The numbers in memory: torch may keep beside it that they are negated, or all 0."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    _check_not_freed(tensor, name)
    return tensor.resolve_neg()


def _check_not_freed(tensor: Tensor, name: str) -> None:
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(
            f"{name}: expected a tensor that has memory, got one of shape {list(tensor.shape)} "
            "whose memory was freed: its storage was resized to 0 bytes"
        )


def check_not_freed(tensor: Tensor, name: str) -> None:
    """As `aligned` does, for a tensor that torch's functions read before the kernels; some of them
    crash the process. Nothing is asked of tensors that are traced or transformed."""
    if torch_state.compiling() or not tensor.is_cpu or type(tensor) not in torch_state.PLAIN:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if tensor.data_ptr() < LOW_ADDRESS and not tensor._is_zerotensor():
        _check_not_freed(tensor, name)


def contiguous(tensor: Tensor, name: str) -> Tensor:
    """Numbers that are adjacent in memory, and as `aligned` has them."""
    tensor = aligned(tensor, name)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def adjacent_columns(rows: Tensor, name: str) -> Tensor:
    """Rows whose columns are adjacent in memory, and as `aligned` has them."""
    rows = aligned(rows, name)
    if rows.is_contiguous() or rows.stride(1) == 1 or rows.shape[1] == 1:
        return rows
    return rows.contiguous()
