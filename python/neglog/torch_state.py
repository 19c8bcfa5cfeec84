"""Questions to torch that have no public answer, each asked in one place.

What is traced or transformed needs the registered op; what is eager may take a shorter path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true

# What torch.compile and torch.export put in a tensor's place; no other subclass is known.
TRACED = (FakeTensor, FunctionalTensor)
PLAIN = (Tensor, torch.nn.Parameter)
# Found once: torch.compile of torch 2.11 cannot trace the question.
AUTOCASTS = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


# A name for each: to look them up takes as long as to call them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_default_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def compiling() -> bool:
    """Whether torch.compile or torch.export is tracing Python."""
    return torch.compiler.is_compiling()


def without_dynamo() -> AbstractContextManager[Any]:
    """Functions that torch.compile made run as they were. Where none was made, torch's compiler is
    not imported, which takes a second."""
    imported = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if imported else nullcontext()


def transforming() -> bool:
    """Whether a transform of torch.func is active, such as grad or vmap."""
    return _transforms_active()


def differentiating_forward() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether a tracer or a dispatch mode is active."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None


def traced(x: Tensor) -> bool:
    """Whether a tracer or a dispatch mode must see the registered op itself."""
    return tracing() or type(x) in TRACED


def eager_on_cpu(x: Tensor) -> bool:
    """Whether nothing but autograd need see what is done to x, which lies in the CPU's memory."""
    return x.is_cpu and not (tracing() or type(x) in TRACED or transforming())


def eager_on_cuda(x: Tensor) -> bool:
    """The same of x in a GPU's memory."""
    return x.is_cuda and not traced(x) and not transforming()


def apply(function: type[Function], x: Tensor, *arguments: Any) -> Any:
    """function.apply(x, *arguments), a microsecond faster: without its search for tensors that
    outlive a transform of torch.func, unless x is one."""
    if _is_wrapped(x):
        return function.apply(x, *arguments)
    return _apply(function)(x, *arguments)


@cache
def _apply(function: type[Function]) -> Callable[..., Any]:
    return super(Function, function).apply  # type: ignore[misc]


def called_directly(function: type[Function]) -> type[Function]:
    """For a class of Function: the node of its graph calls `backward` itself, and not a function of
    torch in Python that looks it up, which takes 0.7 microseconds."""
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return function


def one_upstream(grad: Tensor) -> bool:
    """Not a batch of gradients, as with is_grads_batched=True, nor one inside a transform."""
    return not _is_batched(grad) and not transforming()


def plain_upstream(grad: Tensor | None) -> bool:
    """Whether an eager backward without a graph of its own got one gradient."""
    if grad is None or torch.is_grad_enabled():
        return False
    return not (tracing() or _is_batched(grad) or _transforms_active())


def batched(grad: Tensor | None) -> bool:
    """Whether a gradient is a batch of them, as with is_grads_batched=True."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def concrete(x: Tensor) -> bool:
    """Whether it holds numbers, which nobody traces or maps over. What is decided by numbers of
    another tensor would stand in the graph for all that come later, or has no answer."""
    if compiling() or x.is_meta or traced(x):
        return False
    functorch = torch._C._functorch
    return not (functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


def varies(number: Any) -> bool:
    """Whether a graph that is being made cannot hold it as a constant: a number in a tensor that is
    traced, or one of Python that torch.compile has seen change, and made a symbol of."""
    if isinstance(number, Tensor):
        return not concrete(number)
    return compiling() and not has_static_value(number)


def readable(x: Tensor) -> bool:
    """Whether its numbers can be read without waiting for a device or breaking a graph."""
    return x.is_cpu and concrete(x) and type(x) in PLAIN


def recording() -> bool:
    """Whether a graph is made that runs again: by torch.compile, export, jit.trace or make_fx."""
    if compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None


def known_true(comparison: Any) -> bool:
    """Whether sizes compare so for certain: not while one is symbolic, nor under torch.jit.trace,
    where it is a tensor."""
    return not isinstance(comparison, Tensor) and statically_known_true(comparison)


def jit_tracing() -> bool:
    """Whether torch.jit.trace runs, whose graph is for inputs with gradients and without."""
    return not compiling() and torch._C._get_tracing_state() is not None


def constant(x: Tensor) -> bool:
    """Whether its number may be read now: no tracer must see it, and no derivative follows it."""
    learns = x.requires_grad and torch.is_grad_enabled()
    return not (learns or transforming() or differentiating_forward()) and concrete(x)


def saved_tensors_hooked() -> bool:
    """Whether hooks take what autograd saves, as activation checkpointing and offloading do."""
    return _default_hooks(False) is not None


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
