"""The ops of kl.

neglog::kl            loss of rows, and the two parts of each row's
neglog::kl_backward   gradient of the logits; itself differentiable, by formula.py
neglog::kl_rows       on CUDA alone, what the two are made of there: the rows' losses, and with
                      `gradient` the gradient of the logits for upstreams `grad`, written there. It
                      may be the logits

    loss = token_weight (soft_weight D(z / temperature, teacher) + hard_weight (lse(z) - z_target))

with z = softcap tanh(logit_scale logits / softcap) and the divergence D of beta: 0 is KL(teacher |
student), 1 is KL(student | teacher), between them beta KL(teacher | m) + (1 - beta) KL(student | m)
with m = beta teacher + (1 - beta) student.

Shapes: logits (N, V). teacher, of any floating-point dtype: scores (N, V), which teacher_scale and
teacher_softcap change, both with the temperature in them; or with `probabilities` those; or with
ids (N, K) int64 the log-probabilities (N, K) of these classes at this temperature. What these leave
to 1 is that of all other classes together. target (N,) int64: where it is ignore_index, or
token_weight 0, the row is ignored. token_weight (N,) and num_items () in the accumulation dtype.
grad () or (N,).
Returned: loss () or (N,), total_weight (), divergence (N,) and cross_entropy (N,), 0 where the
weight of it is.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from neglog.ops.define import Op
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll.schema import NONE

NUMBERS = (
    "float beta, float temperature, float soft_weight, float hard_weight, float logit_scale, "
    "float softcap, float teacher_scale, float teacher_softcap"
)
COMPARED = f"SymInt ignore_index, bool probabilities, {NUMBERS}"
TENSORS = "Tensor logits, Tensor teacher, Tensor? ids, Tensor target, Tensor? token_weight"
PARTS = "Tensor divergence, Tensor cross_entropy"
forward = Op(
    f"kl({TENSORS}, Tensor? num_items, int reduction, {COMPARED}, str backend) -> "
    f"(Tensor loss, Tensor total_weight, {PARTS})",
    numbers=NUMBERS,
)
backward = Op(
    f"kl_backward(Tensor grad_loss, {TENSORS}, Tensor total_weight, int reduction, {COMPARED}, "
    "str backend) -> Tensor",
    numbers=NUMBERS,
)
rows = Op(
    f"kl_rows({TENSORS}, Tensor? grad, Tensor(a!)? gradient, {COMPARED}) -> (Tensor loss, {PARTS})",
    compiled=False,
)

# What csrc/kl/kl.cu implements.
ON_CUDA = (rows,)


class Options(NamedTuple):
    """How the two are compared, in the order of the schemas. The numbers are floats, or each a
    tensor ()."""

    ignore_index: int
    probabilities: bool
    beta: Any
    temperature: Any
    soft_weight: Any
    hard_weight: Any
    logit_scale: Any
    softcap: Any
    teacher_scale: Any
    teacher_softcap: Any

    @classmethod
    def of(cls, arguments: Any) -> Options:
        return cls(*attrgetter(*cls._fields)(arguments))


def _forward_shapes(a: Any) -> tuple[Tensor, ...]:
    real, count = real_dtype(a.logits.dtype), a.logits.shape[0]
    loss = a.logits.new_empty((count,) if a.reduction == NONE else (), dtype=real)
    parts = (a.logits.new_empty(count, dtype=real) for _ in range(2))
    return loss, a.logits.new_empty((), dtype=real), *parts


forward.shapes(_forward_shapes)
backward.shapes(lambda a: a.logits.new_empty(a.logits.shape))
