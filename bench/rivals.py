"""The losses of other libraries, of those that can be imported; none is needed.

The calls are those of liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, inf-cl
1.2.1 and memeff 0.3.1. All get contiguous tensors that torch allocated, so aligned to 512 bytes.
"""

import importlib
import os
import site
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from measure import Ways, at_most, gradients
from torch import Tensor

LIGER, CCE, QUACK, INF_CL, MEMEFF = (
    "liger-kernel", "cut-cross-entropy", "quack-kernels", "inf-cl", "memeff",
)  # fmt: skip
FUNCTIONS = {
    (LIGER, "nll"): "liger_kernel.transformers.functional:liger_cross_entropy",
    (LIGER, "linear"): "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
    (CCE, "linear"): "cut_cross_entropy:linear_cross_entropy",
    (QUACK, "nll"): "quack.cross_entropy:cross_entropy",
    (QUACK, "linear"): "quack.linear_cross_entropy:chunked_linear_cross_entropy",
    (INF_CL, "clip"): "inf_cl:cal_flash_loss",
    (MEMEFF, "clip"): "memeff:MemoryEfficientCLIPLoss",
}
Found = Callable[..., Any]
IMPORT_SECONDS = 60.0


tried: dict[str, Found | str] = {}  # at first use: an import can take seconds, or bring all down


def read_path_files() -> None:
    """Python reads no .pth in a folder of PYTHONPATH; what quack-kernels needs is behind one."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if folder:
            site.addsitedir(folder)


def find(where: str) -> Found | str:
    """The function at `module:name`, or why there is none."""
    if not tried:
        read_path_files()
    if where not in tried:
        module, name = where.split(":")
        try:
            with at_most(IMPORT_SECONDS):
                tried[where] = getattr(importlib.import_module(module), name)
        except (Exception, SystemExit) as error:  # a library may stumble over anything
            tried[where] = f"{type(error).__name__}: {error}"[:200]
    return tried[where]


def those(loss: str) -> dict[str, Found]:
    """The libraries that have this loss, with their function."""
    found = {name: find(where) for (name, of), where in FUNCTIONS.items() if of == loss}
    return {name: function for name, function in found.items() if not isinstance(function, str)}


def usable() -> bool:
    return any(not isinstance(find(where), str) for where in FUNCTIONS.values())


def absent() -> dict[str, str]:
    """Why, of the functions that were looked for."""
    found = {key: tried.get(where) for key, where in FUNCTIONS.items()}
    return {f"{name} {loss}": why for (name, loss), why in found.items() if isinstance(why, str)}


def versions() -> dict[str, str | None]:
    """Of the libraries in use, by the names of their packages; None for a folder on the path."""
    found: dict[str, str | None] = {}
    for (name, _), where in FUNCTIONS.items():
        if where in tried and not isinstance(tried[where], str):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
    return found


def nll(leaf: Tensor, target: Tensor) -> Ways:
    """With a gradient in memory of its own: Liger's has none such."""
    quack = those("nll").get(QUACK)
    return {} if quack is None else {QUACK: gradients(lambda: quack(leaf, target), leaf)}


def nll_in_place(logits: Tensor, target: Tensor) -> Ways:
    """Each over a copy of the logits; after the first round over its own gradients."""
    ways, found = {}, those("nll")
    if LIGER in found:  # writes the gradient over its input, always
        liger, over = found[LIGER], logits.clone().requires_grad_()
        ways[LIGER] = gradients(lambda: liger(over, target), over)
    if QUACK in found:
        quack, leaf = found[QUACK], logits.clone().requires_grad_()
        ways[QUACK] = gradients(lambda: quack(leaf, target, inplace_backward=True), leaf)
    return ways


def linear(x: Tensor, weight: Tensor, target: Tensor) -> Ways:
    ways, found = {}, those("linear")
    if QUACK in found:  # on sm_90 one pipeline; elsewhere tuning would compile for minutes
        quack = found[QUACK]
        ways[QUACK] = gradients(lambda: quack(x, weight, target, tuned=False), x, weight)
    if LIGER in found:
        liger = found[LIGER]
        ways[LIGER] = gradients(lambda: liger(x, weight, target), x, weight)
    if CCE in found:
        cce = found[CCE]
        # By default it leaves out gradients below 2^-12, which of random logits over 128256 classes
        # are all but the targets' own.
        ways[CCE] = gradients(lambda: cce(x, weight, target, filter_eps=None), x, weight)
        ways[f"{CCE}, filtered"] = gradients(lambda: cce(x, weight, target), x, weight)
    return ways


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Ways:
    ways, found = {}, those("clip")
    if MEMEFF in found:  # its temperature gets no gradient; "stable" is another gradient's scale
        memeff = found[MEMEFF]
        how = {"temperature": 1 / float(scale.detach()), "normalized_inputs": True, "stable": False}
        ways[MEMEFF] = gradients(lambda: memeff(**how)(image, text), image, text)
    if INF_CL in found:  # a loss a row, of one direction, by float32 heads of a power of two
        one, head = found[INF_CL], min(256, image.shape[1] & -image.shape[1])

        def both() -> Tensor:
            sides = ((image, text), (text, image))
            return sum(one(q, k, scale=scale, head_dim=head).mean() for q, k in sides) / 2

        ways[INF_CL] = gradients(both, image, text, scale)
    return ways
