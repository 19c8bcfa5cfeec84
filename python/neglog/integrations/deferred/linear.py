"""A head that answers with deferred logits: torch.nn.Linear of another class."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neglog import torch_state
from neglog.integrations.deferred.head import deferred_linear
from neglog.integrations.deferred.report import Report
from neglog.integrations.deferred.traced import TracedLogits

PLAIN = torch_state.PLAIN


class DeferredLinear(nn.Linear):
    """nn.Linear whose output is made when something reads it. `defer` makes one of a Linear.

    neglog_report: a Report.
    neglog_min_bytes: smaller logits are made at once.
    neglog_traced: whether torch.compile is to defer them too. What it compiles must then ask
        torch.nn.functional.cross_entropy for the loss, as it lets no torch.nn.CrossEntropyLoss
        see logits that are no tensor.
    """

    neglog_report: Report
    neglog_min_bytes: int
    neglog_traced: bool

    def forward(self, input: Tensor) -> Any:
        weight, bias = self.weight, self.bias
        if not torch.is_grad_enabled():
            return F.linear(input, weight, bias)
        if torch_state.compiling():
            if not self.neglog_traced or not _traceable(input, weight, self.neglog_min_bytes):
                return F.linear(input, weight, bias)
            return TracedLogits(input, weight, bias, _dtype_of_logits(input, weight))
        reason = _why_plain(input, weight, bias, self.neglog_min_bytes)
        if reason:
            self.neglog_report.plain[reason] += 1
            return F.linear(input, weight, bias)
        _keep_weight_gathered(self)
        return deferred_linear(input, weight, bias, self.neglog_report)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here is made again where the module is loaded."""
        if type(self) is DeferredLinear:
            return super().__reduce_ex__(protocol)
        made: Any = super().__reduce_ex__(protocol)
        return (_new, (_original(type(self)),), *made[2:])


def defer(linear: nn.Linear, *, min_bytes: int = 0, traced: bool = False) -> nn.Linear:
    """Makes a head defer its logits, in place, and returns it.

    Its parameters, hooks, name and state_dict stay. While gradients are recorded its output is a
    tensor of logits that have not been computed: torch.nn.functional.cross_entropy and nll_loss,
    gather of log_softmax and logsumexp do without them, whatever else reads them gets them.
    `linear.neglog_report` counts both. A head that is deferred already keeps its report.

    Args:
        linear: a torch.nn.Linear, or of a class derived from it without a forward of its own.
        min_bytes: logits that would take less memory are made at once. Below about 4 MB a loss
            without logits saves no time and little memory (docs/trainers/README.md).
        traced: whether torch.compile is to defer the logits too. Then the compiled function must
            hand them to torch.nn.functional.cross_entropy, not to torch.nn.CrossEntropyLoss, and
            what it returns as logits is no Tensor but an object that makes them.

    Raises:
        TypeError: the module is no plain Linear; the text says why.

    >>> import torch
    >>> from neglog.integrations.deferred import defer
    >>> head = defer(torch.nn.Linear(16, 1000))
    >>> loss = torch.nn.functional.cross_entropy(head(torch.randn(8, 16)), torch.arange(8))
    >>> dict(head.neglog_report.fused)
    {'cross_entropy': 1}
    """
    if isinstance(linear, DeferredLinear):
        linear.neglog_min_bytes, linear.neglog_traced = min_bytes, traced
        return linear
    reason = refusal(linear)
    if reason is not None:
        raise TypeError(
            f"linear: expected a plain torch.nn.Linear, got one that cannot be deferred: {reason}"
        )
    cls: Any = type(linear)
    made: Any = linear
    made.__class__ = _deferred_class(cls)
    made.neglog_report = Report()
    made.neglog_min_bytes, made.neglog_traced = min_bytes, traced
    return linear


def undefer(linear: nn.Module) -> nn.Module:
    """Gives a head its class back, and returns it."""
    if isinstance(linear, DeferredLinear):
        linear.__class__ = _original(type(linear))
        del linear.neglog_report, linear.neglog_min_bytes, linear.neglog_traced
    return linear


def refusal(module: Any) -> str | None:
    """Why a module cannot be deferred, or None."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, nn.Linear):
        return f"{name} is no torch.nn.Linear"
    if type(module).forward not in (nn.Linear.forward, DeferredLinear.forward):
        return f"{name} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as hooks for offloading do"
    for parameter in ("weight", "bias"):
        value = module._parameters.get(parameter)
        if value is None:
            continue
        if hasattr(value, "ds_id"):
            return f"its {parameter} is a part of ZeRO-3, which gathers it for the forward only"
        if not value.is_floating_point():
            return f"its {parameter} is quantised ({value.dtype})"
        if type(value) not in PLAIN and not _is_dtensor(value):
            return f"its {parameter} is a {type(value).__name__}, no plain tensor"
    return None


def _is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _why_plain(input: Any, weight: Any, bias: Any, min_bytes: int) -> str:
    """Why a forward has to compute, or nothing."""
    parts = [input, weight] if bias is None else [input, weight, bias]
    for part in parts:
        if type(part) not in PLAIN:
            return f"a tensor is a {type(part).__name__}"
    if torch_state.tracing() or torch_state.transforming() or torch_state.jit_tracing():
        return "traced or transformed"
    if torch_state.differentiating_forward():
        return "forward-mode differentiation"
    if any(part.is_inference() for part in parts):
        return "tensors of inference mode"
    device, autocast = input.device, torch_state.under_autocast(input)
    alike = all(p.device == device and (autocast or p.dtype == input.dtype) for p in parts)
    if not alike or not input.is_floating_point() or device.type not in ("cpu", "cuda"):
        return "dtypes or devices that differ, or that have no kernels"
    if not input.dim() or input.shape[-1] != weight.shape[-1]:
        return "shapes that do not fit"
    if _bytes(input, weight) < min_bytes:
        return f"logits below {min_bytes / 2**20:g} MB, which save nothing"
    return ""


def _bytes(input: Tensor, weight: Tensor) -> int:
    """Of the logits."""
    rows = input.numel() // max(1, input.shape[-1])
    return rows * weight.shape[0] * weight.element_size()


def _traceable(input: Tensor, weight: Tensor, min_bytes: int) -> bool:
    """Whether a graph is to have logits that are not made."""
    floating = input.is_floating_point() and weight.is_floating_point()
    alike = input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type)
    return floating and alike and _bytes(input, weight) >= min_bytes


def _dtype_of_logits(input: Tensor, weight: Tensor) -> torch.dtype:
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _keep_weight_gathered(head: nn.Module) -> None:
    """fully_shard of the head alone frees the weight after the forward, before the loss."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(head, fsdp.FSDPModule):
        head.set_reshard_after_forward(False)


@cache
def _deferred_class(cls: Any) -> Any:
    """Of Linear, or of a class that another library derived from it (parametrizations, FSDP)."""
    if cls is nn.Linear:
        return DeferredLinear
    return type(f"Deferred{cls.__name__}", (DeferredLinear, cls), {"_neglog_original": cls})


def _original(cls: type) -> type:
    return getattr(cls, "_neglog_original", nn.Linear)


def _new(cls: Any) -> Any:
    made = _deferred_class(cls)
    return made.__new__(made)
