"""Properties, numbers, functions, other libraries: what needs the logits' values or kind."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate
from torch.utils.weak import WeakTensorKeyDictionary

from tests.support.deferred.given import VOCAB, Case, Given


def words(text: str) -> list[str]:
    return text.split()


PROPERTIES = words("""
    shape dtype device layout ndim requires_grad is_leaf is_sparse is_quantized is_cuda is_meta
    is_nested is_cpu is_mps is_xpu is_mkldnn is_sparse_csr itemsize nbytes names output_nr
    retains_grad grad _version data T mT H mH real imag nonexistent
""")
CALLS = words("""
    size dim ndimension numel nelement element_size get_device is_floating_point is_complex
    is_signed is_inference is_conj is_neg is_contiguous stride storage_offset type is_shared
    is_pinned dim_order has_names __len__ is_coalesced sparse_dim tolist item numpy detach clone
    contiguous cpu cuda float double half bfloat16 int long bool byte to_sparse to_dense
    resolve_conj resolve_neg positive neg abs exp exp2 expm1 sin cosh atan erf sigmoid tanh relu
    round floor trunc frac sign sgn square sqrt log log1p rsqrt reciprocal isnan isfinite isinf
    isposinf isreal logical_not bitwise_not sum mean prod std var norm median nanmedian nansum
    max min aminmax amax amin argmax argmin all any count_nonzero nonzero unique logsumexp
    argsort sort flatten ravel trace t diag tril triu nan_to_num apply_ backward
""")


def property_case(name: str) -> Case:
    return lambda x, s: getattr(x, name)


def call_case(name: str) -> Case:
    return lambda x, s: getattr(x, name)()


def save_and_load(x: Tensor, s: Given) -> Any:
    file = io.BytesIO()
    torch.save({"logits": x}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["logits"].detach()


def attributes(x: Tensor, s: Given) -> Any:
    x.note = "mine"
    return x.note, hasattr(x, "other"), x.view(-1).__dict__


def weak(x: Tensor, s: Given) -> Any:
    by_tensor = WeakTensorKeyDictionary()
    by_tensor[x] = 1
    return weakref.ref(x)() is x, by_tensor[x], {x: 2}[x], x in {x}, x in [x]


def with_subclass(x: Tensor, s: Given) -> Any:
    class Named(Tensor):
        pass

    sum_ = x + torch.ones(VOCAB).as_subclass(Named)
    return type(sum_) is Named, sum_.as_subclass(Tensor), type(x.as_subclass(Named)) is Named


def in_function_mode(x: Tensor, s: Given) -> Any:
    names = []

    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Log():
        result = torch.softmax(x, -1)
    return result, names


def in_dispatch_mode(x: Tensor, s: Given) -> Any:
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Count():
        return torch.softmax(x, -1)


CASES: dict[str, Case] = {
    **{f".{name}": property_case(name) for name in PROPERTIES},
    **{f".{name}()": call_case(name) for name in CALLS},
    # Kind
    "isinstance": lambda x, s: (isinstance(x, Tensor), torch.is_tensor(x), callable(x)),
    "size(-1)": lambda x, s: (x.size(-1), x.size(dim=-1), x.shape[-1], x.stride(-1)),
    "size of no dimension": lambda x, s: x.size(9),
    "shape unpacked": lambda x, s: (*x.shape, x.shape.numel(), list(x.size())),
    "shape of the logits before": lambda x, s: (s.base.shape, s.base.stride()),
    "has grad_fn": lambda x, s: (x.grad_fn is None, x.is_leaf),
    "storage": lambda x, s: (x.untyped_storage().nbytes(), x.detach().data_ptr() != 0),
    "data_ptr": lambda x, s: (x.data_ptr() == x.detach().data_ptr(), x.data_ptr() != 0),
    "same object": lambda x, s: (
        x.contiguous() is x,
        x.to(x.dtype) is x,
        x.to(x.device) is x,
        x.type_as(x) is x,
        x.cpu() is x,
        torch.as_tensor(x) is x,
        x.float() is x,
        x.clone() is x,
        x.requires_grad_() is x,
    ),
    "is_set_to": lambda x, s: (x.is_set_to(x), x.is_set_to(x.clone()), x.is_same_size(s.like)),
    "torch's questions": lambda x, s: (
        torch.is_floating_point(x),
        torch.is_complex(x),
        torch.numel(x),
        torch.result_type(x, 1),
        torch.result_type(x, s.like.double()),
        torch.is_grad_enabled(),
        torch.is_nonzero(x.sum()),
        torch.overrides.is_tensor_like(x),
        torch.is_same_size(x, x),
        torch.is_storage(x),
    ),
    "type": lambda x, s: (x.type(), x.type(torch.float64), x.type("torch.DoubleTensor")),
    "attributes": attributes,
    "weak": weak,
    "hash": lambda x, s: (hash(x) == hash(x), hash(x) == hash(x.detach()), hash(x) == id(x)),
    # Numbers
    "float": lambda x, s: (
        float(x.sum()),
        int(x.sum() * 9),
        complex(x.mean()),
        round(x.sum().item(), 2),
    ),
    "float of one of many": lambda x, s: float(x),
    "bool": lambda x, s: (bool(x.sum() > 0), not x.mean()),
    "bool of many": lambda x, s: bool(x),
    "bool in if": lambda x, s: 1 if x else 0,
    "index": lambda x, s: [10 * i for i in range(VOCAB)][x.view(-1)[:VOCAB].argmax()],
    "item": lambda x, s: (x.view(-1)[3].item(), x.sum().item()),
    "format": lambda x, s: (f"{x.detach().view(-1)[0]:.3f}", f"{x.sum().item():.2e}"),
    "format of a sum": lambda x, s: f"{x.sum():.3f}",
    "str": lambda x, s: (str(x.detach()), repr(x.detach().view(-1)[:2]), f"{x.detach()}"),
    "len": lambda x, s: (len(x), x.__len__()),
    "iterate": lambda x, s: list(x),
    "iterate rows": lambda x, s: [row.sum() for row in x],
    "unpack": lambda x, s: (lambda first, *rest: (first, rest))(*x),
    "enumerate and zip": lambda x, s: [
        a * b * i for i, (a, b) in enumerate(zip(x, s.like, strict=True))
    ],
    "reversed": lambda x, s: list(reversed(x)),
    "contains": lambda x, s: (0.0 in x, x.view(-1)[2].item() in x, s.like in x),
    "equal": lambda x, s: (x == x, x != s.like, x == 3, x == "x", x is None, x == None),  # noqa: E711
    "equal to no tensor": lambda x, s: (x == [1], x != {}),
    "compare": lambda x, s: (x < s.like, x <= 0, x < 0, x.gt(0), torch.ge(x, s.like), x.eq(x)),
    "torch.equal": lambda x, s: (torch.equal(x, x), torch.equal(x, s.like), x.allclose(x.clone())),
    "close": lambda x, s: (torch.isclose(x, x), torch.testing.assert_close(x, x.clone())),
    # Copies and files
    "copy": lambda x, s: copy.copy(x).detach(),
    "deepcopy": lambda x, s: copy.deepcopy(x),
    "deepcopy of detached": lambda x, s: copy.deepcopy({"x": x.detach()}),
    "pickle": lambda x, s: pickle.loads(pickle.dumps(x)).detach(),
    "pickle of detached": lambda x, s: pickle.loads(pickle.dumps([x.detach()])),
    "save": save_and_load,
    # NumPy and others
    "numpy": lambda x, s: (
        x.detach().numpy(),
        x.numpy(force=True),
        x.detach().cpu().float().numpy(),
    ),
    "array": lambda x, s: np.asarray(x),
    "array of detached": lambda x, s: (
        np.asarray(x.detach()),
        np.array(x.detach(), dtype=np.float64),
    ),
    "numpy's functions": lambda x, s: (np.exp(x.detach()), np.mean(x.detach().numpy())),
    "numpy's function of logits": lambda x, s: np.exp(x),
    "numpy's number": lambda x, s: (x * np.float32(2), x + np.float64(1), x / np.int64(3)),
    "numpy's number first": lambda x, s: np.float64(2) * x.detach(),
    "dlpack": lambda x, s: (torch.from_dlpack(x.detach()), np.from_dlpack(x.detach())),
    "dlpack device": lambda x, s: (x.__dlpack_device__(), x.detach().__dlpack__() is None),
    "torch.tensor": lambda x, s: (torch.tensor(x), torch.asarray(x), torch.as_tensor(x)),
    "torch.tensor of a list": lambda x, s: torch.tensor([x.sum(), 1.0]),
    "collate": lambda x, s: default_collate([{"x": x[0], "y": 1}, {"x": x[1], "y": 2}]),
    "dataset": lambda x, s: TensorDataset(x, s.target)[1],
    "tree_map": lambda x, s: pytree.tree_map(lambda y: y * 2, {"l": x, "o": (x, 1)}),
    "tree_flatten": lambda x, s: pytree.tree_flatten([x, {"a": x}])[0],
    "tree_map_only": lambda x, s: pytree.tree_map_only(Tensor, lambda y: y.float(), (x, 1)),
    # Arithmetic
    "number": lambda x, s: (
        x + 1,
        1 + x,
        x - 2,
        2 - x,
        x * 3,
        3 * x,
        x / 4,
        4 / x,
        -x,
        +x,
        x**2,
        2**x,
    ),
    "nothing": lambda x, s: (x * 1, x + 0, x / 1, x - 0, x.mul(1.0), x**1),
    "zero": lambda x, s: (x * 0, x * 0.0, torch.nan_to_num(x / 0)),
    "not finite": lambda x, s: (x * float("nan"), x + float("-inf")),
    "negative": lambda x, s: (x * -1, x / -2, -2 * x),
    "bool and int tensors": lambda x, s: (
        x * True,
        x * torch.tensor(2),
        x + torch.ones(VOCAB, dtype=torch.int64),
    ),
    "float64 numbers": lambda x, s: (
        x * torch.tensor(2.0, dtype=torch.float64),
        x + torch.ones(1, dtype=torch.float64),
    ),
    "one number in a tensor": lambda x, s: (
        x * torch.full((1, 1, 1, 1), 2.0),
        x / torch.tensor([4.0]),
    ),
    "number that trains": lambda x, s: x * torch.tensor(2.0, requires_grad=True),
    "floor": lambda x, s: (x // 2, x % 2, x.fmod(2), torch.div(x, 3, rounding_mode="floor")),
    "alpha": lambda x, s: (torch.add(x, s.like, alpha=2), x.sub(1, alpha=3), torch.rsub(x, 2)),
    "tensor": lambda x, s: (x + s.like, s.like + x, x * s.like, s.like - x, x - s.like, s.like / x),
    "bias": lambda x, s: (x + torch.arange(VOCAB), torch.ones(VOCAB) + x, x - torch.ones(VOCAB)),
    "bias that trains": lambda x, s: x + s.head.weight.sum(1),
    "bias of each row": lambda x, s: x + s.like[..., :1],
    "scale of each class": lambda x, s: x * s.normal(VOCAB),
    "scale of each row": lambda x, s: x * s.like[..., :1],
    "itself": lambda x, s: (x + x, x - x, x * x, x / x, torch.maximum(x, x)),
    "wrong shape": lambda x, s: x + torch.ones(VOCAB + 1),
    "wrong operand": lambda x, s: x + "a",
    "wrong operand of the other": lambda x, s: operator.add([1], x),
    "fused": lambda x, s: (
        torch.addcmul(x, s.like, s.like),
        torch.addcdiv(s.like, x, s.like + 9),
        x.lerp(s.like, 0.3),
    ),
    "where": lambda x, s: (
        torch.where(s.mask[..., None], x, 0.0),
        torch.where(x > 0, s.like, x),
        x.where(x > 1, s.like),
    ),
    "mask": lambda x, s: x.masked_fill(~s.mask[..., None], float("-inf")),
    "clamp": lambda x, s: (x.clamp(-1, 1), torch.clamp(x, min=0), x.clip(max=s.like)),
    "maximum": lambda x, s: (torch.maximum(x, s.like), torch.minimum(s.like, x), torch.fmax(x, x)),
    "bitwise": lambda x, s: x & 1,
    "casts": lambda x, s: (
        x.to(torch.float64),
        x.to(dtype=torch.float16),
        x.to(s.like),
        x.type_as(s.normal(1)),
    ),
    "to": lambda x, s: (
        x.to("cpu"),
        x.to(torch.device("cpu"), torch.float32),
        x.to("cpu", copy=True),
    ),
    "to meta": lambda x, s: x.detach().to("meta"),
    "casts there and back": lambda x, s: (
        x.bfloat16().float(),
        x.half().float() * 2,
        x.double().float(),
    ),
    "cast then scale": lambda x, s: (x.bfloat16() * 3, (x * 3).bfloat16(), x.half() / 3 + 1),
    "cast of memory format": lambda x, s: x.to(memory_format=torch.contiguous_format),
    # Matrices and functions
    "matmul": lambda x, s: (
        x @ s.head.weight,
        s.head.weight.T @ x.mT,
        torch.matmul(x, s.normal(VOCAB, 3).to(x.dtype)),
    ),
    "einsum": lambda x, s: (
        torch.einsum("...v,vd->...d", x, s.head.weight.to(x.dtype)),
        torch.einsum("...v->v", x),
    ),
    "linear": lambda x, s: F.linear(x, s.normal(3, VOCAB).to(x.dtype)),
    "another layer": lambda x, s: torch.nn.Sequential(torch.nn.LayerNorm(VOCAB), torch.nn.ReLU())(
        x.float()
    ),
    "softmax": lambda x, s: (
        x.softmax(-1),
        F.softmax(x, dim=-1),
        torch.softmax(x, 0),
        F.softmax(x, -1, dtype=torch.float64),
    ),
    "log_softmax": lambda x, s: (
        x.log_softmax(-1),
        F.log_softmax(x, dim=-1),
        torch.log_softmax(x, 0),
        x.log_softmax(-1, torch.float64),
    ),
    "softmax without dim": lambda x, s: F.softmax(x),
    "logsumexp": lambda x, s: (
        x.logsumexp(-1),
        torch.logsumexp(x, 0),
        x.logsumexp((0, -1)),
        x.logsumexp(-1, keepdim=True),
    ),
    "softmin and gumbel": lambda x, s: (
        F.softmin(x, -1),
        F.gumbel_softmax(x, hard=True),
        F.logsigmoid(x),
    ),
    "activations": lambda x, s: (
        F.relu(x),
        F.gelu(x),
        F.silu(x),
        F.softplus(x),
        F.leaky_relu(x),
        F.glu(x[..., :6]),
    ),
    "dropout": lambda x, s: (F.dropout(x, 0.5), F.dropout(x, 0.5, training=False)),
    "norms": lambda x, s: (
        F.layer_norm(x, (VOCAB,)),
        F.normalize(x, dim=-1),
        x.renorm(2, 0, 1),
        torch.linalg.vector_norm(x),
    ),
    "cosine": lambda x, s: (
        F.cosine_similarity(x, s.like, -1),
        torch.cdist(x.view(-1, VOCAB), s.like.view(-1, VOCAB)),
    ),
    "sum": lambda x, s: (
        x.sum(-1),
        x.sum((0, -1)),
        x.sum(0, keepdim=True),
        torch.sum(x, dtype=torch.float64),
        sum(x),
    ),
    "mean": lambda x, s: (x.mean(-1), x.var(-1, correction=0), torch.std_mean(x), x.norm(dim=-1)),
    "max": lambda x, s: (
        x.max(-1),
        torch.max(x),
        x.max(s.like),
        x.min(dim=0),
        x.amax(-1),
        max(x.view(-1)),
    ),
    "argmax": lambda x, s: (x.argmax(-1), torch.argmax(x, dim=-1, keepdim=True), x.argmin(0)),
    "topk": lambda x, s: (x.topk(3), torch.topk(x, 2, dim=-1, largest=False), x.kthvalue(2)),
    "topk of too many": lambda x, s: x.topk(VOCAB + 1),
    "sort": lambda x, s: (
        x.sort(-1, descending=True),
        torch.argsort(x, -1),
        x.msort(),
        torch.searchsorted(torch.zeros(3), x.detach()),
    ),
    "cumulative": lambda x, s: (
        x.cumsum(-1),
        x.cumprod(-1),
        x.logcumsumexp(-1),
        x.cummax(-1),
        x.diff(),
    ),
    "median": lambda x, s: (
        x.median(-1),
        x.mode(-1),
        x.quantile(0.5) if x.dtype == torch.float32 else None,
        x.float().histc(4),
    ),
    "count": lambda x, s: (
        x.count_nonzero(-1),
        (x > 0).sum(),
        x.detach().unique(),
        x.nonzero(as_tuple=True),
        torch.bincount(x.argmax(-1).view(-1)),
    ),
    "bincount of numbers": lambda x, s: torch.bincount(x),
    "one-hot": lambda x, s: F.one_hot(x.argmax(-1), VOCAB),
    "embedding of the best": lambda x, s: F.embedding(x.argmax(-1), s.head.weight),
    "embedding of no indices": lambda x, s: F.embedding(x, s.head.weight),
    "sampling": lambda x, s: (
        torch.multinomial(x.softmax(-1).view(-1, VOCAB), 2),
        torch.bernoulli(x.sigmoid()),
    ),
    "distribution": lambda x, s: (lambda d: (d.sample(), d.entropy(), d.log_prob(s.target)))(
        torch.distributions.Categorical(logits=x)
    ),
    "likes": lambda x, s: (
        torch.zeros_like(x),
        torch.ones_like(x),
        x.new_zeros(3),
        x.new_tensor([1.0]),
        torch.full_like(x, 2),
        torch.rand_like(x),
        torch.empty_like(x).shape,
    ),
    "likes that train": lambda x, s: torch.zeros_like(x, requires_grad=True).shape,
    "cat": lambda x, s: (
        torch.cat([x, s.like]),
        torch.cat([s.like, x], -1),
        torch.cat([x, x]),
        torch.concat((x,)),
    ),
    "cat of parts": lambda x, s: (torch.cat(x.split(1)), torch.cat(list(x), -1)),
    "stack": lambda x, s: (
        torch.stack([x, s.like]),
        torch.stack(list(x)),
        torch.stack((s.like, x), -1),
        torch.hstack([x, x]),
        torch.vstack([x, s.like]),
    ),
    "cat of other dtype": lambda x, s: torch.cat([x, s.like.double()]),
    "cat of other shape": lambda x, s: torch.cat([x, torch.zeros(2, 2)]),
    "pad and repeat": lambda x, s: (
        F.pad(x, (0, 1)),
        x.repeat(2, 1, 1, 1),
        x.repeat_interleave(2, 0),
        x.tile(2),
        x.roll(1, -1),
        x.flip(0),
    ),
    "gather": lambda x, s: (
        x.gather(-1, s.target[..., None]),
        torch.gather(x, -1, s.target.unsqueeze(-1)).squeeze(-1),
        x.take_along_dim(s.target[..., None], -1),
        x.take(s.target),
    ),
    "gather out of range": lambda x, s: x.gather(-1, s.target[..., None] + VOCAB),
    "select": lambda x, s: (
        x.index_select(-1, torch.tensor([0, 2])),
        x.index_select(0, torch.tensor([1, 0])),
        x.masked_select(x > 0),
    ),
    "scatter": lambda x, s: (
        x.scatter(-1, s.target[..., None], 0.0),
        x.index_fill(-1, torch.tensor([1]), 2.0),
        s.like.scatter(-1, s.target[..., None], x),
        x.index_add(-1, torch.tensor([0]), x[..., :1]),
    ),
    "put": lambda x, s: (
        x.index_put((torch.tensor([0]),), torch.tensor(0.0)),
        x.masked_scatter(x > 0, s.like),
        s.like.index_copy(0, torch.tensor([0]), x[:1]),
    ),
    "broadcast": lambda x, s: (
        torch.broadcast_tensors(x, torch.zeros(3, *x.shape)),
        torch.broadcast_to(x, (2, *x.shape)),
        torch.atleast_3d(x),
        torch.block_diag(x.view(-1, VOCAB), torch.eye(2)),
    ),
    "outer": lambda x, s: (
        torch.outer(x.view(-1), x.view(-1)),
        torch.dot(x.view(-1), x.view(-1)),
        torch.kron(x, torch.eye(2).to(x.dtype)),
    ),
    "foreach": lambda x, s: torch._foreach_mul([x, s.like], 2.0),
    "map": lambda x, s: x.detach().clone().map_(s.like, lambda a, b: a + b),
    "operator": lambda x, s: (
        operator.mul(x, 2),
        operator.neg(x),
        operator.matmul(x, x.mT),
        operator.itemgetter(0)(x),
    ),
    # Modes
    "subclass": with_subclass,
    "function mode": in_function_mode,
    "dispatch mode": in_dispatch_mode,
    "as_strided": lambda x, s: x.as_strided((2, 2), (VOCAB, 1)),
    "device context": lambda x, s: _in_device(x),
}


def _in_device(x: Tensor) -> Any:
    with torch.device("cpu"):
        return x.softmax(-1), torch.zeros(2) + x.sum()
