"""The losses as modules."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.jit.frontend import NotSupportedError
from torch.nn.modules.loss import _WeightedLoss

from neglog.checks import check_flags, to_count
from neglog.checks_of_pairs import check_groups
from neglog.distributed.exchange import gather_rows
from neglog.distributed.groups import check_group, meet
from neglog.losses._result import LossStats
from neglog.losses.clip import clip_loss, siglip_loss
from neglog.losses.cross_entropy import cross_entropy, masked_cross_entropy
from neglog.losses.info_nce import info_nce
from neglog.losses.linear_cross_entropy import linear_cross_entropy
from neglog.losses.nt_xent import dcl, nt_xent
from neglog.losses.sup_con import sup_con

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CLIPLoss", "CrossEntropyLoss", "DCLLoss", "InfoNCELoss", "LinearCrossEntropyLoss",
    "MaskedCrossEntropyLoss", "NTXentLoss", "Queue", "SigLIPLoss", "SupConLoss",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)


def _named(function: Callable[..., Any], *excluded: str) -> dict[str, Parameter]:
    """The parameters with a name of their own, which *args and **kwargs have not."""
    parameters = signature(function).parameters.items()
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {name: x for name, x in parameters if name not in excluded and x.kind not in several}


class _NotScriptable(NotSupportedError):
    """torch's error for what TorchScript cannot express, without a line of source to point at."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)

    __str__ = Exception.__str__


class _Loss(torch.nn.Module):
    """A loss as a module: the constructor takes the arguments that `forward` does not.

    Those of the torch module that the class extends come first, then the function's others. Each is
    an attribute, so that a Parameter is one of the module; class weights are a buffer.
    """

    _constructor: ClassVar[Signature]
    _of_torch: ClassVar[set[str]]  # the arguments that torch's constructor takes
    _options: ClassVar[list[str]]  # the arguments of the function that are attributes
    __signature__: ClassVar[Signature]

    def __init_subclass__(cls, function: Any = None, own: tuple[str, ...] = ()) -> None:
        """own: arguments of `function` that are no attributes."""
        if function is not None:
            base: Any = cls.__bases__[-1]
            of_torch = _named(base.__init__, "self")
            options = _named(function, *own, *_named(cls.forward))
            cls._of_torch, cls._options = set(of_torch), list(options)
            cls._constructor = Signature(list({**of_torch, **options}.values()))
            cls.__signature__ = cls._constructor
        elif own_init := vars(cls).get("__init__"):  # a user's subclass
            cls.__signature__ = Signature(list(signature(own_init).parameters.values())[1:])

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for name in options:
            if name not in self._constructor.parameters:
                raise TypeError(f"{type(self).__name__}: got an unexpected argument {name!r}")
        try:
            bound = self._constructor.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        super().__init__(**{name: bound.arguments.pop(name) for name in self._of_torch})
        if "weight" in bound.arguments:
            self.register_buffer("weight", bound.arguments.pop("weight"))
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for, at any depth of a model."""
        raise _NotScriptable(
            f"torch.jit.script: expected no {type(self).__name__}, whose arguments TorchScript has "
            "no types for; use torch.compile or torch.export, or torch.jit.trace, which take it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = getattr(self, "group", None)
        if group is not None:  # cannot be copied, and the copy belongs to the same processes
            memo[id(group)] = group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name, self) for name in self._constructor.parameters}
        hidden = (Tensor, torch.nn.Module)
        return ", ".join(f"{name}={x!r}" for name, x in shown.items() if not isinstance(x, hidden))


class CrossEntropyLoss(
    _Loss, torch.nn.CrossEntropyLoss, function=cross_entropy, own=("size_average", "reduce")
):
    """torch.nn.CrossEntropyLoss by neglog.cross_entropy; takes its further options by keyword.

    Shapes, dtypes and errors as in `neglog.cross_entropy`.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, num_items: int | Tensor | None = None,
        token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    ) -> Tensor | LossStats:  # fmt: skip
        return cross_entropy(
            input, target, num_items=num_items, token_weight=token_weight,
            per_sequence=per_sequence, **self._given(),
        )  # fmt: skip


class MaskedCrossEntropyLoss(_Loss, function=masked_cross_entropy):
    """neglog.masked_cross_entropy as a module, called with input (..., C), target, mask (...)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for name in ("ignore_index", "size_average", "reduce"):
            if name in options:
                raise TypeError(f"{name}: expected none, as the mask says what counts")
        super().__init__(*arguments, **options)

    def forward(
        self, input: Tensor, target: Tensor, mask: Tensor, num_items: int | Tensor | None = None,
        token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    ) -> Tensor | LossStats:  # fmt: skip
        return masked_cross_entropy(
            input, target, mask, num_items=num_items, token_weight=token_weight,
            per_sequence=per_sequence, **self._given(),
        )  # fmt: skip


class _Head(_WeightedLoss):
    """What torch.nn.LinearCrossEntropyLoss holds, for a torch that has none: before 2.13."""

    def __init__(
        self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (),
        bias: bool = False, device: Any = None, dtype: torch.dtype | None = None,
        reduction: str = "mean", weight: Tensor | None = None, ignore_index: int | None = None,
        label_smoothing: float = 0.0, options: Any = None,
    ) -> None:  # fmt: skip
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected ({num_classes},), got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options = options
        rows = num_classes * math.prod(out_features)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)


if TYPE_CHECKING:
    _TorchHead = _Head
else:
    _TorchHead = getattr(torch.nn, "LinearCrossEntropyLoss", _Head)


class LinearCrossEntropyLoss(
    _Loss, _TorchHead, function=linear_cross_entropy, own=("linear_weight", "linear_bias")
):
    """torch.nn.LinearCrossEntropyLoss by neglog.linear_cross_entropy; its parameter is `linear`.

    Called with input (..., in_features) and target; `mask`, `num_items`, `token_weight` and
    `per_sequence` by keyword.
    """

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None,
        num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
        per_sequence: bool | Tensor = False,
    ) -> Tensor | LossStats:  # fmt: skip
        classes, head = (self.num_classes, *self.out_features), self.linear
        weight = head.weight.view(*classes, head.in_features)
        bias = None if head.bias is None else head.bias.view(classes)
        return linear_cross_entropy(
            input, weight, target, linear_bias=bias, mask=mask, num_items=num_items,
            token_weight=token_weight, per_sequence=per_sequence, **self._given(),
        )  # fmt: skip


class InfoNCELoss(_Loss, function=info_nce):
    """neglog.info_nce as a module, called with query, positive_key and perhaps negative_keys.

    Its options may also be given to the call, where they come first.
    """

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
        **options: Any,
    ) -> Tensor | LossStats:  # fmt: skip
        return info_nce(query, positive_key, negative_keys, **{**self._given(), **options})


class CLIPLoss(_Loss, function=clip_loss):
    """neglog.clip_loss as a module, called as open_clip's ClipLoss.

    With output_dict it returns {"contrastive_loss": loss}, as that does.
    """

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: Literal[False] = False, *,
        exclude: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, *, output_dict: Literal[True],
        exclude: Tensor | None = None,
    ) -> dict[str, Tensor]: ...  # fmt: skip
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False, *,
        exclude: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        loss = clip_loss(
            image_features, text_features, logit_scale, logit_bias, exclude=exclude, **self._given()
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLIPLoss(_Loss, function=siglip_loss):
    """neglog.siglip_loss as a module, called as open_clip's SigLipLoss, with output_dict too."""

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None, output_dict: Literal[False] = False, *,
        exclude: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None, output_dict: Literal[True], *,
        exclude: Tensor | None = None,
    ) -> dict[str, Tensor]: ...  # fmt: skip
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None, output_dict: bool = False, *,
        exclude: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        loss = siglip_loss(
            image_features, text_features, logit_scale, logit_bias, exclude=exclude, **self._given()
        )
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(_Loss, function=nt_xent):
    """neglog.nt_xent as a module, called with two views z_i, z_j."""

    def forward(self, z_i: Tensor, z_j: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        return nt_xent(z_i, z_j, exclude=exclude, **self._given())


class DCLLoss(_Loss, function=dcl):
    """neglog.dcl as a module, called with two views z_i, z_j."""

    def forward(self, z_i: Tensor, z_j: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        return dcl(z_i, z_j, exclude=exclude, **self._given())


class SupConLoss(_Loss, function=sup_con):
    """neglog.sup_con as a module, called with features and labels."""

    def forward(
        self, features: Tensor, labels: Tensor | Sequence[Hashable] | None = None
    ) -> Tensor:
        return sup_con(features, labels, **self._given())


class Queue(torch.nn.Module):
    """The last `size` keys pushed, as negatives for `info_nce` (MoCo, arXiv:1911.05722).

    A batch may have any number of rows, the last of an epoch too. What it holds are buffers: the
    keys, and `position`, how many there are and the row that the next one takes. So they move, are
    saved, and are broadcast by DistributedDataParallel with the module. Inside what torch.compile
    compiles, both calls break the graph. On a device the numbers are known without waiting for it,
    unless something else wrote them since: a broadcast, or a state dict.

    with_ids: an integer is pushed with each key, and `key_ids()` gives those of the keys, as
    `negative_ids` of `info_nce`: what the queue still holds of a query is no negative of it.
    dtype: of the keys, a floating one.
    """

    keys: Tensor
    ids: Tensor | None
    position: Tensor

    def __init__(
        self, size: int, dim: int, *, with_ids: bool = False, dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        size, dim = to_count("size", size), to_count("dim", dim)
        check_flags(with_ids=with_ids)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype, device=device))
        ids = torch.zeros(size, dtype=torch.int64, device=device) if with_ids else None
        self.register_buffer("ids", ids)
        self.register_buffer("position", torch.zeros(2, dtype=torch.int64, device=device))
        self._known: tuple[Tensor, int, list[int]] | None = None

    def __len__(self) -> int:
        return self._position()[0]

    def _position(self) -> list[int]:
        position = self.position
        if _costs_no_wait(position):
            return position.tolist()
        version, known = _version(position), self._known
        if known is None or known[0] is not position or known[1] != version or version < 0:
            known = self._known = position, version, position.tolist()
        return known[2]

    def _move(self, filled: int, following: int) -> None:
        self.position[0].fill_(filled)  # a number at a time: to copy a tensor there would wait
        self.position[1].fill_(following)
        if not torch.compiler.is_compiling():
            self._known = self.position, _version(self.position), [filled, following]

    def forward(self) -> Tensor:
        """(len, D): a copy, since the next push may come before the backward of what used it.

        Warns if there are none: without negatives a loss is 0, and so is its gradient.
        """
        filled = self._position()[0]
        if not filled:
            warnings.warn(
                "Queue: it holds no keys, and against none the loss is 0; push() keys after each "
                "step, and leave the loss out while len() is 0",
                stacklevel=2,
            )
        return self.keys[:filled].clone()

    def key_ids(self) -> Tensor:
        """(len,): of the keys that a call gives; a copy. Raises ValueError without `with_ids`."""
        if self.ids is None:
            raise ValueError("key_ids: expected a Queue made with with_ids=True")
        return self.ids[: self._position()[0]].clone()

    @torch.no_grad()
    def push(
        self, keys: Tensor, ids: Tensor | None = None, *, group: ProcessGroup | None = None
    ) -> None:  # fmt: skip
        """Take (N, D), and with `with_ids` their (N,) integers, in, in place of the oldest.

        group: a torch.distributed process group: those of all processes, by rank, of which each may
        have another number. So the queues of all stay alike, and no loss needs to gather them.

        Raises RuntimeError for another number of features, or of ids, and for queues that are not
        alike in the group.
        """
        size, dim = self.keys.shape
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys: expected a Tensor, got {type(keys).__name__}")
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise RuntimeError(f"keys: expected shape (N, {dim}), got {list(keys.shape)}")
        if not keys.dtype.is_floating_point:
            raise RuntimeError(f"keys: expected a floating-point dtype, got {keys.dtype}")
        if (ids is None) != (self.ids is None):
            expected = "None" if self.ids is None else "a Tensor, as the Queue was made with_ids"
            raise TypeError(f"ids: expected {expected}, got {type(ids).__name__}")
        filled, start = self._position()
        if self.ids is not None:
            check_groups("ids", ids, keys)
        if group is not None:
            check_group(group)
            keys, ids = _of_all(group, keys, ids, size=size, filled=filled, position=start)
        if self.ids is not None:
            _put(self.ids, ids, start)
        _put(self.keys, keys, start)
        rows = min(size, keys.shape[0])
        self._move(min(size, filled + rows), (start + rows) % size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        numbers = state_dict.pop(f"{prefix}_extra_state", None)  # where they were no buffer
        if numbers is not None:
            position = torch.tensor([numbers["filled"], numbers["next"]])
            state_dict[f"{prefix}position"] = position
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        ids = "" if self.ids is None else ", with_ids=True"
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}{ids}"


def _of_all(
    group: Any, keys: Tensor, ids: Tensor | None, **queue: int
) -> tuple[Tensor, Tensor | None]:
    """What is pushed by all processes, to queues that are alike."""
    ranks = meet("Queue.push", group, keys, keys.shape[0], features=keys.shape[1], **queue)
    keys = gather_rows(keys.detach(), ranks.rows, ranks.name)
    return keys, None if ids is None else gather_rows(ids.long(), ranks.rows, ranks.name)


def _put(held: Tensor, new: Any, start: int) -> None:
    """The last rows of `new`, as many as there is room for, from row `start` on and round."""
    if new.untyped_storage().data_ptr() == held.untyped_storage().data_ptr():
        new = new.clone()  # what is held
    new = new[-held.shape[0] :]
    to_end = min(new.shape[0], held.shape[0] - start)
    held[start : start + to_end] = new[:to_end]
    held[: new.shape[0] - to_end] = new[to_end:]


def _version(x: Tensor) -> int:
    """Changes with each change of x in place; that of one made in inference mode is not counted."""
    return -1 if x.is_inference() else x._version


def _costs_no_wait(x: Tensor) -> bool:
    return x.is_cpu or torch.compiler.is_compiling()
