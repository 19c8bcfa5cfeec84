"""A head whose logits are not made until something reads them. It knows no framework but torch.

    defer(linear)       # its class becomes DeferredLinear; its output DeferredLogits
    undefer(linear)

recipe     what the logits would be
aten       which operations on them are understood, and what they make of a recipe
tensor     DeferredLogits, below autograd
head       the node of autograd that they come from
functions  what torch's functions of logits become
losses     neglog's kernels of a recipe
chunks     the loss of a head with a low-rank adapter
linear     DeferredLinear
traced     the same inside of torch.compile
report     what became of the logits, counted
"""

from neglog.integrations.deferred import functions as functions
from neglog.integrations.deferred.linear import DeferredLinear, defer, refusal, undefer
from neglog.integrations.deferred.report import Report
from neglog.integrations.deferred.tensor import DeferredLogits

__all__ = ["DeferredLinear", "DeferredLogits", "Report", "defer", "refusal", "undefer"]
