"""Views and indices, what writes through them, and writes to the logits themselves."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.deferred.given import VOCAB, Case, Given

long = torch.tensor

INDICES: dict[str, Case] = {
    "[0]": lambda x, s: x[0],
    "[-1]": lambda x, s: x[-1],
    "[-2]": lambda x, s: x[-2],
    "[0, 0]": lambda x, s: x[0, 0],
    "[0][0]": lambda x, s: x[0][0],
    "[(0, -1)]": lambda x, s: x[(0, -1)],
    "[0, 0, 0]": lambda x, s: x[0, 0, 0],
    "[:]": lambda x, s: x[:],
    "[...]": lambda x, s: x[...],
    "[()]": lambda x, s: x[()],
    "[:, 0]": lambda x, s: x[:, 0],
    "[:, -1]": lambda x, s: x[:, -1],
    "[:, -1, :]": lambda x, s: x[:, -1, :],
    "[:, -1:]": lambda x, s: x[:, -1:],
    "[:, :-1]": lambda x, s: x[:, :-1],
    "[..., :-1, :]": lambda x, s: x[..., :-1, :],
    "[:, 1:-1]": lambda x, s: x[:, 1:-1],
    "[:, ::2]": lambda x, s: x[:, ::2],
    "[1:, 1::3]": lambda x, s: x[1:, 1::3],
    "[..., 0]": lambda x, s: x[..., 0],
    "[..., -1]": lambda x, s: x[..., -1],
    "[..., 2:4]": lambda x, s: x[..., 2:4],
    "[..., :]": lambda x, s: x[..., :],
    "[..., :7]": lambda x, s: x[..., :VOCAB],
    "[..., :99]": lambda x, s: x[..., :99],
    "[..., 0:]": lambda x, s: x[..., 0:],
    "[..., ::1]": lambda x, s: x[..., ::1],
    "[..., ::2]": lambda x, s: x[..., ::2],
    "[..., :-1]": lambda x, s: x[..., :-1],
    "[None]": lambda x, s: x[None],
    "[:, None]": lambda x, s: x[:, None],
    "[..., None]": lambda x, s: x[..., None],
    "[..., None, :]": lambda x, s: x[..., None, :],
    "[None, ..., None]": lambda x, s: x[None, ..., None],
    "[None, 0, None]": lambda x, s: x[None, 0, None],
    "[0:0]": lambda x, s: x[0:0],
    "[9:]": lambda x, s: x[9:],
    "[:, 3:1]": lambda x, s: x[:, 3:1],
    "[True]": lambda x, s: x[True],
    "[False]": lambda x, s: x[False],
    "[tensor of one]": lambda x, s: x[long(1)],
    "[:, tensor of one]": lambda x, s: x[:, long(1)],
    "[slice of tensors]": lambda x, s: x[long(0) : long(1)],
    "[numpy's integer]": lambda x, s: x[np.int64(1)],
    "[slice of numpy's]": lambda x, s: x[: np.int64(1)],
    "[range]": lambda x, s: x[range(2)],
    "narrow": lambda x, s: x.narrow(0, 0, 1),
    "narrow classes": lambda x, s: x.narrow(-1, 1, 3),
    "select": lambda x, s: x.select(0, -1),
    "select of a class": lambda x, s: torch.select(x, -1, 2),
    "get by slice()": lambda x, s: x[slice(None), slice(1, None)],
    "getitem": lambda x, s: operator.getitem(x, (..., slice(None, -1), slice(None))),
}

VIEWS: dict[str, Case] = {
    "view(-1, V)": lambda x, s: x.view(-1, VOCAB),
    "view(-1, size)": lambda x, s: x.view(-1, x.size(-1)),
    "view(list)": lambda x, s: x.view([-1, VOCAB]),
    "view(Size)": lambda x, s: x.view(x.shape),
    "view(1, ..., V)": lambda x, s: x.view(1, *x.shape),
    "view(n, -1)": lambda x, s: x.view(x.shape[0], -1),
    "view(-1)": lambda x, s: x.view(-1),
    "view(V, -1)": lambda x, s: x.view(VOCAB, -1),
    "view of equal numbers": lambda x, s: x.view(1, -1, 1, VOCAB),
    "view(dtype)": lambda x, s: x.detach().view(torch.int16),
    "view_as": lambda x, s: x.view_as(s.like),
    "reshape(-1, V)": lambda x, s: x.reshape(-1, VOCAB),
    "reshape(V, -1)": lambda x, s: x.reshape(VOCAB, -1),
    "torch.reshape": lambda x, s: torch.reshape(x, (-1, VOCAB)),
    "reshape by keyword": lambda x, s: x.reshape(shape=(-1, VOCAB)),
    "reshape_as": lambda x, s: x.reshape_as(s.like),
    "flatten(0, 1)": lambda x, s: x.flatten(0, 1),
    "flatten(0, -2)": lambda x, s: x.flatten(0, -2),
    "flatten by keyword": lambda x, s: x.flatten(start_dim=0, end_dim=1),
    "flatten(1)": lambda x, s: x.flatten(1),
    "torch.flatten": lambda x, s: torch.flatten(x, 0, 1),
    "nn.Flatten": lambda x, s: torch.nn.Flatten(0, 1)(x),
    "unflatten": lambda x, s: x.unflatten(0, (-1, 1)),
    "unflatten of classes": lambda x, s: x.unflatten(-1, (VOCAB, 1)),
    "squeeze": lambda x, s: x[:1].squeeze(),
    "squeeze(0)": lambda x, s: x[:1].squeeze(0),
    "squeeze of nothing": lambda x, s: x.squeeze(0),
    "squeeze(-1)": lambda x, s: x.squeeze(-1),
    "squeeze of two": lambda x, s: x[:1, None].squeeze((0, 1)),
    "unsqueeze(0)": lambda x, s: x.unsqueeze(0),
    "unsqueeze(1)": lambda x, s: torch.unsqueeze(x, 1),
    "unsqueeze(-1)": lambda x, s: x.unsqueeze(-1),
    "unsqueeze(-2)": lambda x, s: x.unsqueeze(dim=-2),
    "transpose": lambda x, s: x.transpose(1, 2),
    "transpose of rows": lambda x, s: x.transpose(0, 1),
    "transpose and back": lambda x, s: x.transpose(0, 1).transpose(0, 1),
    "mT": lambda x, s: x.mT,
    "permute": lambda x, s: x.permute(0, 2, 1),
    "permute of rows": lambda x, s: torch.permute(x, (1, 0, 2)),
    "movedim": lambda x, s: x.movedim(-1, 0),
    "swapaxes": lambda x, s: x.swapaxes(0, 1),
    "t": lambda x, s: x.t(),
    "expand": lambda x, s: x.expand(3, *x.shape),
    "expand(-1)": lambda x, s: x[None].expand(2, *(-1,) * x.dim()),
    "expand_as": lambda x, s: x.expand_as(s.like),
    "unfold": lambda x, s: x.unfold(-1, 3, 2),
    "diagonal": lambda x, s: x.diagonal(),
    "alias": lambda x, s: torch.ops.aten.alias(x),
    "detach": lambda x, s: x.detach(),
    "data": lambda x, s: x.data,
    "contiguous": lambda x, s: x.contiguous(),
    "shifted, contiguous": lambda x, s: x[..., :-1, :].contiguous(),
    "shifted, contiguous, rows": lambda x, s: x[..., :-1, :].contiguous().view(-1, VOCAB),
    "shifted, view": lambda x, s: x[..., :-1, :].view(-1, VOCAB),
    "shifted, reshape": lambda x, s: x[..., :-1, :].reshape(-1, VOCAB),
    "float": lambda x, s: x.float(),
    "to its own dtype": lambda x, s: x.to(x.dtype),
    "real": lambda x, s: x.real,
    "ravel": lambda x, s: x.ravel(),
    "view_copy": lambda x, s: torch.view_copy(x, (-1, VOCAB)),
    "clone": lambda x, s: x.clone(),
    "identity": lambda x, s: torch.nn.Identity()(x),
    "dropout of none": lambda x, s: F.dropout(x, 0.0, training=False),
    "torch.squeeze": lambda x, s: torch.squeeze(x[None], 0),
}

SEVERAL: dict[str, Case] = {
    "chunk": lambda x, s: x.chunk(2),
    "chunk of classes": lambda x, s: x.chunk(3, dim=-1),
    "split": lambda x, s: x.split(1),
    "split of sizes": lambda x, s: torch.split(x, [3, VOCAB - 3], dim=-1),
    "split of rows": lambda x, s: x.split(2, dim=1),
    "unbind": lambda x, s: x.unbind(),
    "unbind of classes": lambda x, s: torch.unbind(x, -1),
    "tensor_split": lambda x, s: x.tensor_split(2, 0),
    "hsplit": lambda x, s: torch.hsplit(x, [1]),
    "iteration": lambda x, s: tuple(x),
}

COPIES: dict[str, Case] = {
    "[mask of rows]": lambda x, s: x[s.mask],
    "[mask of numbers]": lambda x, s: x[x > 0],
    "[mask of the first]": lambda x, s: x[torch.arange(len(x)) == 1],
    "[mask, ids]": lambda x, s: x[s.mask, 2],
    "[:, mask]": lambda x, s: x[:, torch.arange(x.shape[1]) != 1],
    "[mask of the wrong shape]": lambda x, s: x[torch.ones(9, dtype=torch.bool)],
    "[bytes]": lambda x, s: x[s.mask.byte()],
    "[list]": lambda x, s: x[[1, 0]],
    "[list of one]": lambda x, s: x[[0]],
    "[list of bools]": lambda x, s: x[[True] + [False] * (len(x) - 1)],
    "[lists]": lambda x, s: x[[1, 0], [0, -1]],
    "[list, :]": lambda x, s: x[[1, 1, 0], :],
    "[:, list]": lambda x, s: x[:, [0, 2]],
    "[..., list]": lambda x, s: x[..., [1, 3]],
    "[tensor]": lambda x, s: x[long([0, 1, 0])],
    "[empty tensor]": lambda x, s: x[long([], dtype=torch.long)],
    "[tensor of two axes]": lambda x, s: x[long([[0], [1]])],
    "[tensors]": lambda x, s: x[long([[0], [1]]), long([0, 1])],
    "[rows, target]": lambda x, s: x[torch.arange(len(x)), s.target[:, 0]],
    "[:, tensor]": lambda x, s: x[:, long([1, 0])],
    "[0, tensor]": lambda x, s: x[0, long([1, 0])],
    "[None, tensor]": lambda x, s: x[None, :, long([1, 0])],
    "[int32]": lambda x, s: x[long([1], dtype=torch.int32)],
    "[numpy]": lambda x, s: x[np.array([1, 0])],
    "[nonzero]": lambda x, s: x[s.mask.nonzero(as_tuple=True)],
    "[-2 of tensor]": lambda x, s: x[long([-1, -2])],
    "[9]": lambda x, s: x[9],
    "[:, 9]": lambda x, s: x[:, 9],
    "[-9]": lambda x, s: x[-9],
    "[tensor of 9]": lambda x, s: x[long([9])],
    "[too many]": lambda x, s: x[0, 0, 0, 0, 0],
    "[two ellipses]": lambda x, s: x[..., 0, ...],
    "[name]": lambda x, s: x["logits"],
    "[float]": lambda x, s: x[1.0],
    "[::-1]": lambda x, s: x[::-1],
    "[tensor of floats]": lambda x, s: x[long([1.0])],
    "view of the wrong size": lambda x, s: x.view(-1, VOCAB + 1),
    "view of two unknowns": lambda x, s: x.view(-1, -1),
    "reshape of the wrong size": lambda x, s: x.reshape(3, VOCAB),
    "transpose of no axis": lambda x, s: x.transpose(0, 7),
    "unsqueeze of no axis": lambda x, s: x.unsqueeze(7),
    "flatten of no axis": lambda x, s: x.flatten(0, 7),
    "squeeze of no axis": lambda x, s: x.squeeze(7),
}


def written(view: Case, on_view: bool) -> Case:
    """In place on a view, or on what it is of: the other one changes too."""

    def case(x: Tensor, s: Given) -> Any:
        part = view(x, s)
        (part if on_view else x).mul_(2)
        return part, x

    return case


def written_without_gradient(view: Case, on_view: bool) -> Case:
    def case(x: Tensor, s: Given) -> Any:
        part = view(x, s)
        with torch.no_grad():
            (part if on_view else x).copy_((part if on_view else x).detach() + 1)
        return part.detach(), x.detach()

    return case


def item_set(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


def item_added(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] += value
    return x


def without_gradient(x: Tensor, write: Any) -> Tensor:
    with torch.no_grad():
        write(x)
    return x


def through_numpy(x: Tensor, s: Given) -> Any:
    x.detach().numpy()[..., 0] = 3
    return x


def through_data(x: Tensor, s: Given) -> Any:
    x.data.mul_(2)
    return x


def other_data(x: Tensor, s: Given) -> Any:
    x.data = s.like
    return x


def set_requires_grad(x: Tensor, value: bool) -> Any:
    x.requires_grad = value
    return x.requires_grad


def in_place(name: str) -> Case:
    return lambda x, s: (getattr(x, name)(), x._version)


def first_written(split: Case) -> Case:
    return lambda x, s: (split(x, s)[0].mul_(2), x)


IN_PLACE: dict[str, Case] = {
    **{
        f".{name}()": in_place(name)
        for name in [
            "zero_",
            "exp_",
            "tanh_",
            "relu_",
            "sigmoid_",
            "abs_",
            "neg_",
            "square_",
            "round_",
            "requires_grad_",
            "nan_to_num_",
            "cumsum_",
            "normal_",
            "uniform_",
            "share_memory_",
        ]
    },
    "add_": lambda x, s: (x.add_(1), x),
    "add_ of a tensor": lambda x, s: (x.add_(s.like, alpha=2), x._version),
    "add_ of a bias": lambda x, s: x.add_(torch.ones(VOCAB)),
    "sub_ of the maximum": lambda x, s: x.sub_(x.max(-1, keepdim=True).values),
    "mul_": lambda x, s: x.mul_(0.5) is x,
    "div_": lambda x, s: x.div_(0.7),
    "pow_": lambda x, s: x.pow_(2),
    "addcmul_": lambda x, s: x.addcmul_(s.like, s.like),
    "+=": lambda x, s: operator.iadd(x, 1),
    "-=": lambda x, s: operator.isub(x, s.like),
    "*=": lambda x, s: operator.imul(x, 2),
    "/=": lambda x, s: operator.itruediv(x, 3),
    "//=": lambda x, s: operator.ifloordiv(x, 3),
    "**=": lambda x, s: operator.ipow(x, 2),
    "%=": lambda x, s: operator.imod(x, 2),
    "@=": lambda x, s: operator.imatmul(x, torch.eye(VOCAB).to(x.dtype)),
    "+= of the wrong shape": lambda x, s: operator.iadd(x, torch.ones(3, *x.shape)),
    "fill_": lambda x, s: x.fill_(1.5),
    "clamp_": lambda x, s: x.clamp_(-1, 1),
    "copy_": lambda x, s: x.copy_(s.like),
    "copied from": lambda x, s: s.like.copy_(x),
    "masked_fill_": lambda x, s: x.masked_fill_(s.mask[..., None], -9.0),
    "masked_scatter_": lambda x, s: x.masked_scatter_(x > 0, s.like),
    "index_fill_": lambda x, s: x.index_fill_(-1, long([1, 2]), float("-1e4")),
    "index_add_": lambda x, s: x.index_add_(0, long([0]), s.like[:1]),
    "index_copy_": lambda x, s: x.index_copy_(0, long([0]), s.like[:1]),
    "index_put_": lambda x, s: x.index_put_((long([0]),), torch.tensor(1.0, dtype=x.dtype)),
    "scatter_": lambda x, s: x.scatter_(-1, s.target[..., None], 0.0),
    "scatter_add_": lambda x, s: x.scatter_add_(-1, s.target[..., None], s.like),
    "[0] =": lambda x, s: item_set(x, 0, 0.0),
    "[..., 0] =": lambda x, s: item_set(x, (..., 0), -1e4),
    "[..., 4:] =": lambda x, s: item_set(x, (..., slice(4, None)), float("-inf")),
    "[mask] =": lambda x, s: item_set(x, s.mask, 0.0),
    "[x > 0] =": lambda x, s: item_set(x, x > 0, 1.0),
    "[:] =": lambda x, s: item_set(x, slice(None), s.like),
    "[...] = of itself": lambda x, s: item_set(x, ..., x * 2),
    "[:, 0] = [:, 1]": lambda x, s: item_set(x, (slice(None), 0), x[:, 1]),
    "[list] =": lambda x, s: item_set(x, [0], 5.0),
    "[tensor] =": lambda x, s: item_set(x, long([0, 1]), s.like[:2]),
    "[9] =": lambda x, s: item_set(x, 9, 0.0),
    "[0] = of the wrong shape": lambda x, s: item_set(x, 0, torch.ones(99)),
    "other[0] =": lambda x, s: item_set(s.like, 0, x[0]),
    "other[mask] =": lambda x, s: item_set(s.like, s.mask, x[s.mask]),
    "[0] +=": lambda x, s: item_added(x, 0, 1.0),
    "[..., 1:3] +=": lambda x, s: item_added(x, (..., slice(1, 3)), 2.0),
    "[mask] +=": lambda x, s: item_added(x, s.mask, 1.0),
    "del [0]": lambda x, s: operator.delitem(x, 0),
    "in place without gradient": lambda x, s: without_gradient(x, lambda y: y.add_(1)),
    "set without gradient": lambda x, s: without_gradient(
        x, lambda y: y.__setitem__((..., 0), 7.0)
    ),
    "zeroed without gradient": lambda x, s: without_gradient(x, torch.nn.init.zeros_),
    "on a view without gradient": lambda x, s: without_gradient(x, lambda y: y[0].mul_(3)),
    "on detached": lambda x, s: (x.detach().mul_(2), x),
    "on detached view": lambda x, s: (x.view(-1).detach()[0].zero_(), x),
    "on data": through_data,
    "through numpy": through_numpy,
    "requires_grad_(False)": lambda x, s: x.requires_grad_(False),
    "requires_grad = False": lambda x, s: set_requires_grad(x, False),
    "requires_grad = True": lambda x, s: set_requires_grad(x, True),
    "out": lambda x, s: torch.add(s.like, 1, out=x),
    "out of detached": lambda x, s: (torch.add(s.like, 1, out=x.detach()), x),
    "out for logits": lambda x, s: torch.add(x, 1, out=s.like),
    "out for detached logits": lambda x, s: torch.exp(x.detach(), out=torch.empty_like(x.detach())),
    "topk out": lambda x, s: torch.topk(
        x.detach(), 1, out=(x.new_empty(0), x.new_empty(0, dtype=torch.long))
    ),
    "functions in place": lambda x, s: (F.dropout(x, 0.5, inplace=True), x),
    "ReLU in place": lambda x, s: torch.nn.ReLU(inplace=True)(x),
    "in place after clone": lambda x, s: (x.clone().mul_(2), x),
    "in place of what came before": lambda x, s: (s.base.mul_(2), x),
    "in place of what came before, detached": lambda x, s: (s.base.detach().mul_(2), x),
    "twice": lambda x, s: (x.mul_(2), x.view(-1).add_(1), x[0].neg_(), x),
    "after a read": lambda x, s: (x.sum().item(), x.mul_(2), x),
    "after a read that saved it": lambda x, s: (x.square().sum(), x.mul_(2).shape),
    "foreach in place": lambda x, s: (torch._foreach_mul_([x], 2.0), x),
}

CASES: dict[str, Case] = {
    **INDICES,
    **VIEWS,
    **SEVERAL,
    **COPIES,
    **IN_PLACE,
    **{
        f"{name}, written {'to' if on_view else 'under'}{how}": write(view, on_view)
        for name, view in {**INDICES, **VIEWS}.items()
        for on_view in (True, False)
        for how, write in (("", written), (" without gradient", written_without_gradient))
    },
    **{f"{name}, first written": first_written(split) for name, split in SEVERAL.items()},
}
