"""Questions to torch that have no public answer, each asked in one place.

What is traced or transformed needs the registered op; what is eager may take a shorter path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function

# What torch.compile and torch.export put in a tensor's place; no other subclass is known.
TRACED = (FakeTensor, FunctionalTensor)
PLAIN = (Tensor, torch.nn.Parameter)
# Found once: torch.compile of torch 2.11 cannot trace the question.
AUTOCASTS = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


def compiling() -> bool:
    """Whether torch.compile or torch.export is tracing Python."""
    return torch.compiler.is_compiling()


def transforming() -> bool:
    """Whether a transform of torch.func is active, such as grad or vmap."""
    return torch._C._are_functorch_transforms_active()


def differentiating_forward() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether a tracer or a dispatch mode is active."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def traced(x: Tensor) -> bool:
    """Whether a tracer or a dispatch mode must see the registered op itself."""
    return tracing() or type(x) in TRACED


def eager_on_cpu(x: Tensor) -> bool:
    """Whether nothing but autograd need see what is done to x, which lies in the CPU's memory."""
    return x.is_cpu and not traced(x) and not transforming()


def apply(function: type[Function], x: Tensor, *arguments: Any) -> Any:
    """function.apply(x, *arguments), a microsecond faster: without its search for tensors that
    outlive a transform of torch.func, unless x is one."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return function.apply(x, *arguments)
    return super(Function, function).apply(x, *arguments)  # type: ignore[misc]


def one_upstream(grad: Tensor) -> bool:
    """Not a batch of gradients, as with is_grads_batched=True, nor one inside a transform."""
    return not torch._C._functorch.is_legacy_batchedtensor(grad) and not transforming()


def plain_upstream(grad: Tensor | None) -> bool:
    """Whether an eager backward without a graph of its own got one gradient."""
    return grad is not None and not torch.is_grad_enabled() and not tracing() and one_upstream(grad)


def batched(arguments: tuple) -> bool:
    """Whether a gradient among them is a batch of gradients, as with is_grads_batched=True."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any(isinstance(x, Tensor) and is_batched(x) for x in arguments)


def readable(x: Tensor) -> bool:
    """Whether its numbers can be read without waiting for a device or breaking a graph."""
    return x.is_cpu and type(x) in PLAIN and not compiling() and not transforming()


def constant(x: Tensor) -> bool:
    """Whether its number may be read now: no tracer must see it, and no derivative follows it."""
    learns = x.requires_grad and torch.is_grad_enabled()
    return not (learns or traced(x) or transforming() or differentiating_forward())


def saved_tensors_hooked() -> bool:
    """Whether hooks take what autograd saves, as activation checkpointing and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device in AUTOCASTS and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: autocast changes all floats but float64."""
    if not under_autocast(x) or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there, while the host cannot wait for the device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
