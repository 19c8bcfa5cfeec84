"""DTensors as arguments of the losses over classes: each process works on what it has.

    classes sharded over a dimension of the mesh    vocabulary parallel over its group
    rows sharded                                    each its own rows; sums and counts are added up
    replicated, or a plain tensor                   as it is; a plain one is cut to the rows here
    partial                                         added up first

So a mean is that of all rows, however unlike the shards are, and no tensor of the size of the
logits or of the head is gathered. Where there is no rule, such as classes that two dimensions
shard, the functions answer None, and the whole tensors are taken (distributed/tensors.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog.checks import REDUCTIONS, to_ignore_index
from neglog.distributed.tensors import is_distributed
from neglog.distributed.vocab_parallel import shared, total
from neglog.losses._result import LossStats
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll.formula import total_weight
from neglog.torch_state import autocast_dtype, under_autocast


class Layout(NamedTuple):
    """Which dimension of a mesh shards what: classes, or by dimension the axis of rows."""

    mesh: Any
    classes: int | None
    rows: dict[int, int]

    def placements(self, axis_of: Callable[[int], int]) -> list[Any]:
        """Of a tensor with these rows, whose axis is `axis_of` that of the layout."""
        from torch.distributed.tensor import Replicate, Shard

        return [
            Shard(axis_of(self.rows[d])) if d in self.rows else Replicate()
            for d in range(self.mesh.ndim)
        ]

    def groups(self) -> list[str]:
        """The names of the groups over which rows are sharded."""
        return [str(self.mesh.get_group(d).group_name) for d in self.rows]

    def whole(self, x: Tensor) -> Tensor:
        """The sum over the processes that have other rows; one loss of all."""
        for name in self.groups():
            x = total(x, name)
        return x

    def parts(self, x: Any) -> Any:
        """A number or weight that all have, whose gradient each has a part of."""
        if isinstance(x, Tensor) and x.requires_grad:
            for name in self.groups():
                x = shared(x, name)
        return x

    def local(self, x: Tensor, placements: list[Any]) -> Tensor:
        """What is here of a tensor so placed."""
        from torch.distributed.tensor import DTensor, Replicate

        if not is_distributed(x):
            if all(p.is_replicate() for p in placements):
                return x
            everywhere = [Replicate()] * self.mesh.ndim
            x = DTensor.from_local(x, self.mesh, everywhere, run_check=False)
        given: Any = x
        return given.redistribute(self.mesh, placements).to_local()

    def distributed(self, local: Tensor, placements: list[Any], shape: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def _layout(x: Any, class_axis: int) -> Layout | None:
    """Of logits; None where there is no rule."""
    classes, rows = None, {}
    for d, placement in enumerate(x.placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        if type(placement).__name__ != "Shard":
            return None
        axis = placement.dim % x.dim()
        if axis != class_axis:
            rows[d] = axis
        elif classes is None:
            classes = d
        else:
            return None
    return Layout(x.device_mesh, classes, rows)


def _one_mesh(mesh: Any, arguments: dict[str, Any]) -> bool:
    return all(x.device_mesh == mesh for x in arguments.values() if is_distributed(x))


def _whole(x: Any) -> Any:
    return x.full_tensor() if is_distributed(x) else x


def _plain_arguments(arguments: dict[str, Any]) -> bool:
    """Whether all is of a kind that has a rule; what is wrong has an error elsewhere."""
    weight = arguments["weight"]
    learns = isinstance(weight, Tensor) and weight.requires_grad
    return arguments["reduction"] in REDUCTIONS and not learns


# Logits


# What no shard of classes takes, and what each is without.
WHOLE_ONLY: dict[str, Any] = {"token_weight": None, "per_sequence": False, "logits_dtype": None}


def of_shards(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments without those that no shard takes; None where one of these is given."""
    if any(arguments.get(name, plain) is not plain for name, plain in WHOLE_ONLY.items()):
        return None
    return {name: x for name, x in arguments.items() if name not in WHOLE_ONLY}


def sharded_logits(
    arguments: dict[str, Any], class_axis: int, function: Callable[..., Any],
    parallel: Callable[..., Any],
) -> Any:  # fmt: skip
    """cross_entropy or masked_cross_entropy of `arguments`, whose logits are a DTensor; None where
    there is no rule. function and parallel: of logits that are whole, and of a shard of classes."""
    x, target = arguments["input"], arguments["target"]
    if not (is_distributed(x) and isinstance(target, Tensor) and _plain_arguments(arguments)):
        return None
    layout = _layout(x, class_axis) if x.dim() and x.is_floating_point() else None
    if layout is None or not _one_mesh(layout.mesh, arguments):
        return None
    probabilities = target.shape == x.shape
    of_rows = tuple(x.shape[:class_axis]) + tuple(x.shape[class_axis + 1 :])
    if not probabilities and tuple(target.shape) != of_rows:
        return None
    mask = arguments.get("mask")
    if mask is not None and (probabilities or not _broadcasts(mask, of_rows)):
        return None
    given = {k: _whole(v) for k, v in arguments.items() if k not in ("input", "target", "mask")}
    by_row = layout.placements(lambda axis: axis if axis < class_axis else axis - 1)
    placed = _of_classes(layout, layout.placements(lambda axis: axis), class_axis)
    local = layout.local(x, placed)
    if probabilities:
        target = layout.local(target, placed)
    else:
        target = layout.local(target, by_row)
    if mask is not None:
        given["mask"] = layout.local(_expanded(mask, of_rows), by_row)
    run, vocab = function, x.shape[class_axis]
    if layout.classes is not None:
        run = parallel
        given |= {"group": layout.mesh.get_group(layout.classes), "vocab_size": vocab}
    divisor = _local_divisor(local, target, given, probabilities)
    if divisor is not None:
        given["num_items"] = layout.whole(divisor)
    return _reduced(layout, run, local, target, given, by_row, of_rows)


def _of_classes(layout: Layout, placements: list[Any], class_axis: int) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(class_axis) if d == layout.classes else p for d, p in enumerate(placements)]


def _broadcasts(mask: Any, shape: tuple[int, ...]) -> bool:
    try:
        fits = torch.broadcast_shapes(tuple(mask.shape), shape) == torch.Size(shape)
    except (RuntimeError, AttributeError):
        return False
    return fits and mask.dtype == torch.bool


def _expanded(mask: Any, shape: tuple[int, ...]) -> Tensor:
    return mask if tuple(mask.shape) == shape else _whole(mask).expand(shape)


def _local_divisor(
    x: Tensor, target: Tensor, given: dict[str, Any], probabilities: bool
) -> Tensor | None:
    """What this process's rows add to the divisor of a mean; None where it is given."""
    if given["reduction"] != "mean" or given["num_items"] is not None:
        return None
    real, weight = real_dtype(x.dtype), given["weight"]
    if probabilities:
        rows = target.numel() // max(1, target.shape[1 if target.dim() > 1 else 0])
        return torch.full((), rows, dtype=real, device=x.device)
    if "mask" in given:
        counted = given["mask"]
    else:
        counted = target != to_ignore_index(given["ignore_index"])
    return total_weight(target, counted, weight, real)


def _reduced(
    layout: Layout, run: Callable[..., Any], local: Tensor, target: Tensor, given: dict[str, Any],
    by_row: list[Any], of_rows: tuple[int, ...],
) -> Any:  # fmt: skip
    """The loss of all rows, of what `run` gives for those here."""
    wanted = given["loss_dtype"]
    if wanted is None:
        wanted = torch.float32 if under_autocast(local) else local.dtype
    reduces = given["reduction"] != "none"
    if reduces and local.itemsize == 2 and local.is_floating_point():
        given["loss_dtype"] = torch.float32  # a part is not rounded before it is added up
    given["logit_scale"] = layout.parts(given["logit_scale"])
    if "inplace_backward" in given:  # of a replicated one it would be the argument's own memory
        given["inplace_backward"] = False
    result = run(local, target=target, **given)
    loss = result if isinstance(result, Tensor) else result.loss
    if reduces:
        everywhere = [_replicate()] * layout.mesh.ndim
        loss = layout.distributed(layout.whole(loss).to(wanted), everywhere, ())
    else:
        loss = layout.distributed(loss, by_row, of_rows)
    if isinstance(result, Tensor):
        return loss
    return LossStats(loss, *(layout.distributed(x, by_row, of_rows) for x in result[1:]))


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


# A head


def sharded_head(
    arguments: dict[str, Any], labels_of: Callable[..., Tensor], function: Callable[..., Any],
    parallel: Callable[..., Any],
) -> Any:  # fmt: skip
    """linear_cross_entropy of `arguments`, of which hidden states or weight are DTensors; None
    where there is no rule."""
    hidden, weight, target = (arguments[name] for name in ("input", "linear_weight", "target"))
    bias = arguments["linear_bias"]
    tensors = all(isinstance(x, Tensor) for x in (hidden, weight, target))
    if not tensors or not _plain_arguments(arguments):
        return None
    first = next((x for x in (weight, hidden) if is_distributed(x)), None)
    if first is None or not _one_mesh(first.device_mesh, arguments):
        return None
    positions = tuple(hidden.shape[:-1])
    mask, shift = arguments["mask"], arguments["shift"]
    if weight.dim() != 2 or tuple(target.shape) != positions or not isinstance(shift, bool):
        return None
    if hidden.shape[-1] != weight.shape[1] or (
        mask is not None and not _broadcasts(mask, positions)
    ):
        return None
    layout, sequence = _layout_of_head(first.device_mesh, hidden, weight)
    by_position = arguments["reduction"] == "none" or arguments["return_stats"]
    if layout is None or (shift and by_position):  # which is one shorter than its shards
        return None
    ignored = arguments["ignore_index"]
    ignored = to_ignore_index(-100 if ignored is None else ignored)
    # Whole: they are integers, and `shift` moves them from one shard to the next.
    labels = labels_of(_whole(target), _whole(mask), shift, ignored)
    given = {
        name: _whole(x) for name, x in arguments.items()
        if name not in ("input", "linear_weight", "linear_bias", "target", "mask", "shift")
    }  # fmt: skip
    by_row = layout.placements(lambda axis: axis)
    if given["reduction"] == "mean" and given["num_items"] is None:
        real = real_dtype(autocast_dtype(hidden))
        given["num_items"] = total_weight(labels, labels != ignored, given["weight"], real)
    given |= {
        "ignore_index": ignored, "linear_weight": _local_weight(layout, weight),
        "linear_bias": None if bias is None else _local_weight(layout, bias),
    }  # fmt: skip
    run = function
    if layout.classes is not None:
        run = parallel
        given |= {"group": layout.mesh.get_group(layout.classes), "vocab_size": weight.shape[0]}
        given["reduce_hidden_grad"] = not sequence
    local = _local_hidden(layout, hidden, by_row, sequence)
    target = layout.local(labels, by_row)
    return _reduced(layout, run, local, target, given, by_row, positions)


def _layout_of_head(mesh: Any, hidden: Any, weight: Any) -> tuple[Layout | None, bool]:
    """And whether hidden states are sharded over the dimension that shards classes, as after a
    sequence-parallel layer: then they are gathered first."""
    classes, rows, sequence = None, {}, False
    none: tuple[Layout | None, bool] = (None, False)
    for d in range(mesh.ndim):
        of_weight = weight.placements[d] if is_distributed(weight) else None
        of_hidden = hidden.placements[d] if is_distributed(hidden) else None
        for placement in (of_weight, of_hidden):
            if placement is not None and type(placement).__name__ not in KNOWN:
                return none
        if of_weight is not None and of_weight.is_shard(0):
            if classes is not None:
                return none
            classes = d
        if of_hidden is not None and of_hidden.is_shard():
            axis = of_hidden.dim % hidden.dim()
            if axis == hidden.dim() - 1:
                continue
            if d == classes:
                sequence = True
            else:
                rows[d] = axis
    return Layout(mesh, classes, rows), sequence


KNOWN = ("Shard", "Replicate", "Partial", "_Partial")


def _local_weight(layout: Layout, x: Tensor) -> Tensor:
    """The classes here, of a weight or bias; their gradients are added up over other rows."""
    placements = _of_classes(layout, [_replicate()] * layout.mesh.ndim, 0)
    return layout.parts(layout.local(x, placements))


def _local_hidden(layout: Layout, x: Tensor, by_row: list[Any], sequence: bool) -> Tensor:
    if not sequence:
        return layout.local(x, by_row)
    from torch.distributed.tensor import Partial

    # What comes back is each process's part, which the redistribution adds up and shares out.
    given: Any = x
    back = [Partial() if d == layout.classes else p for d, p in enumerate(by_row)]
    return given.redistribute(layout.mesh, by_row).to_local(grad_placements=back)
