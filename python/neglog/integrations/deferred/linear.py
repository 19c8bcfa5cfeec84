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

PLAIN = torch_state.PLAIN


class DeferredLinear(nn.Linear):
    """nn.Linear whose output is made when something reads it. `defer` makes one of a Linear.

    neglog_report: a Report.
    """

    neglog_report: Report

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch_state.compiling():
            return F.linear(input, self.weight, self.bias)
        weight, bias = self.weight, self.bias
        reason = _why_plain(input, weight, bias)
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


def defer(linear: nn.Linear) -> nn.Linear:
    """Makes a head defer its logits, in place, and returns it.

    Its parameters, hooks, name and state_dict stay. While gradients are recorded its output is a
    tensor of logits that have not been computed: torch.nn.functional.cross_entropy and nll_loss,
    gather of log_softmax and logsumexp do without them, whatever else reads them gets them.
    `linear.neglog_report` counts both. A head that is deferred already stays as it is.

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
    return linear


def undefer(linear: nn.Module) -> nn.Module:
    """Gives a head its class back, and returns it."""
    if isinstance(linear, DeferredLinear):
        linear.__class__ = _original(type(linear))
        del linear.neglog_report
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


def _why_plain(input: Any, weight: Any, bias: Any) -> str:
    """Why a forward has to compute, or nothing."""
    parts = [input, weight] if bias is None else [input, weight, bias]
    for part in parts:
        if type(part) not in PLAIN:
            return f"a tensor is a {type(part).__name__}"
    if torch_state.tracing() or torch_state.transforming() or torch_state.jit_tracing():
        return "traced or transformed"
    if torch_state.differentiating_forward():
        return "forward-mode differentiation"
    if not any(part.requires_grad for part in parts):
        return "nothing requires a gradient"
    if any(part.is_inference() for part in parts):
        return "tensors of inference mode"
    device, autocast = input.device, torch_state.under_autocast(input)
    alike = all(p.device == device and (autocast or p.dtype == input.dtype) for p in parts)
    if not alike or not input.is_floating_point() or device.type not in ("cpu", "cuda"):
        return "dtypes or devices that differ, or that have no kernels"
    if not input.dim() or input.shape[-1] != weight.shape[-1]:
        return "shapes that do not fit"
    return ""


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
