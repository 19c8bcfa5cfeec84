"""Memory of the ops: where results go, and the tensors and addresses that the CPU kernels want."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neglog.kernels.memory import large_buffer, use_huge_pages
from neglog.tiles import plan


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


def number(value: float, dtype: torch.dtype) -> Tensor:
    """() on the CPU, whatever torch.set_default_device says: its memory may be written."""
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def address(tensor: Tensor | None, start: int = 0) -> int:
    """Of the number at `start`; 0 for "not given". An empty tensor has no address: it gets 1,
    which nobody reads."""
    return 0 if tensor is None else (tensor.data_ptr() or 1) + start * tensor.itemsize


def aligned(tensor: Tensor) -> Tensor:
    """A copy where a tensor begins within a number, as torch.frombuffer can make it: C++ must not
    read one there."""
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def contiguous(tensor: Tensor) -> Tensor:
    """Numbers that are adjacent in memory, and aligned."""
    return aligned(tensor.contiguous())


def adjacent_columns(rows: Tensor) -> Tensor:
    """Rows whose columns are adjacent in memory, and aligned, as the kernels want them."""
    return aligned(rows) if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
