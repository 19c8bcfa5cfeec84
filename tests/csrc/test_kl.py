"""The CUDA kernels of kl: on a GPU and, emulated, on the CPU."""

import faulthandler
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from neglog import reference
from neglog.ops.kl import cuda
from neglog.ops.kl.schema import Options, backward, forward
from tests.support.cuda_devices import (
    DTYPES,
    GRADIENT,
    LOSS,
    MEAN,
    NONE,
    SUM,
    Waits,
    normal,
    off,
    real_of,
)

INF, NAN = float("inf"), float("nan")
BETAS = [0.0, 0.3, 1.0]
KINDS = ["scores", "probabilities", "named"]
PLAIN = {}
ALL = {
    "temperature": 2.5, "soft_weight": 0.6, "hard_weight": 0.4, "logit_scale": 0.7, "softcap": 5.0,
    "teacher_scale": 1.3, "teacher_softcap": 8.0,
}  # fmt: skip


def teacher(kind, shape, dtype, seed=1, count=5):
    """The teacher and, of named classes, their ids: rows at a stride that no vector divides."""
    logits = normal(*shape, seed=seed) * 2
    ids = None
    if kind == "probabilities":
        logits = logits.softmax(1)
    if kind == "named":
        logits, ids = logits.log_softmax(1).topk(min(count, shape[1]), 1)
    return F.pad(logits, (1, 4)).to(dtype)[:, 1:-4], ids


class Case:
    """Rows of a student and a teacher, compared by the op and by the oracle."""

    def __init__(self, device, kind, shape, dtype, teacher_dtype=None, **options):
        rows, vocab = shape
        self.device, self.kind, self.dtype = device, kind, dtype
        self.logits = (normal(rows, vocab + 3) * 3).to(dtype)[:, 2:-1]
        self.teacher, self.ids = teacher(kind, shape, teacher_dtype or dtype)
        self.target = normal(rows, seed=2).abs().mul(1e6).long() % vocab
        self.target[1::5] = -100
        self.token_weight = None
        self.options = options

    def values(self):
        """The options as the op takes them."""
        given = {"beta": 0.0, "temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0}
        given |= {"logit_scale": 1.0, "softcap": 0.0, "teacher_scale": 1.0, "teacher_softcap": 0.0}
        given |= self.options
        for name in ("teacher_scale", "teacher_softcap"):
            given[name] /= given["temperature"]
        return Options(-100, self.kind == "probabilities", **given)

    def tensors(self):
        given = (self.logits, self.teacher, self.ids, self.target, self.token_weight)
        return [None if x is None else x.to(self.device.name) for x in given]

    def run(self, grad=None, gradient=None, logits=None):
        """Loss, divergence, cross-entropy."""
        given = self.tensors()
        if logits is not None:
            given[0] = logits
        return self.device.ops.kl_rows(*given, grad, gradient, *self.values())

    def run_with_gradient(self, grad=None):
        gradient = torch.full_like(self.logits, 7).to(self.device.name)
        return *self.run(grad, gradient), gradient

    def truth(self, grad=1.0):
        def array(x):
            return None if x is None else x.double().numpy()

        found = reference.kl(
            array(self.logits), array(self.teacher),
            ids=None if self.ids is None else self.ids.numpy(), target=self.target.numpy(),
            probabilities=self.kind == "probabilities", token_weight=array(self.token_weight),
            grad_loss=grad, reduction="none", **self.options,
        )  # fmt: skip
        return found.loss, found.divergence, found.cross_entropy, found.grad

    def check(self, found, grad=1.0, loosely=1.0):
        """found: what `run_with_gradient` returns."""
        *losses, of_logits = self.truth(grad)
        for one, expected in zip(found[:3], losses, strict=True):
            assert off(one, expected) <= loosely * LOSS[self.dtype]
        assert off(found[3], of_logits) <= loosely * GRADIENT[self.dtype]


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# Each dtype loads other vectors. Less than one, a rest, a warp's, a block's, and several loads of a
# block's threads.
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3, 7), (6, 31), (5, 257), (3, 2049), (2, 9001)])
def test_against_the_oracle(device, dtype, shape, kind, beta, options):
    case = Case(device, kind, shape, dtype, beta=beta, **options)
    found = case.run_with_gradient()
    case.check(found)
    assert not found[3][1].any()
    equal(case.run(), found[:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype_of_teacher", DTYPES, ids=str)
def test_a_teacher_of_another_dtype(device, dtype, dtype_of_teacher, kind):
    for beta in BETAS:
        case = Case(device, kind, (4, 301), dtype, dtype_of_teacher, beta=beta, **ALL)
        case.check(case.run_with_gradient())


# One option at a time; each alone takes another branch.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [
    {"temperature": 0.5}, {"hard_weight": 0.5}, {"temperature": 3.0, "hard_weight": 0.5},
    {"soft_weight": 0.0, "hard_weight": 1.0}, {"soft_weight": 0.0}, {"soft_weight": -2.0},
    {"logit_scale": 0.3}, {"softcap": 4.0}, {"softcap": 1e300}, {"softcap": 1e-300},
    {"teacher_scale": 0.3}, {"teacher_softcap": 4.0}, {"beta": 1e-3}, {"beta": 0.999},
], ids=str)  # fmt: skip
def test_options(device, dtype, kind, option):
    case = Case(device, kind, (4, 131), dtype, **option)
    if option.get("softcap") == 1e-300:
        case.logits[0, :2] = 0
    case.check(case.run_with_gradient())


# A weight of 0 ignores a row as its target does: its numbers may be NaN, its ids and target none.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [31, 2049])
def test_weights_of_rows_and_rows_that_are_ignored(device, dtype, vocab, kind):
    case = Case(device, kind, (7, vocab), dtype, beta=0.3, **ALL)
    weight = torch.tensor([0.5, 0.0, -1.5, 1.0, 3.0, -0.0, 0.25], dtype=real_of(dtype))
    case.token_weight = weight.repeat_interleave(2)[::2]
    case.target[:] = torch.tensor([0, vocab, 1, -100, 2, -1, 3])
    for row in (1, 3, 5):
        case.logits[row] = case.teacher[row] = NAN
        if kind == "named":
            case.ids[row] = vocab
    upstream = torch.tensor([1.0, NAN, 2.0, INF, -1.0, 1.0, 0.0], dtype=real_of(dtype))
    found = case.run_with_gradient(upstream.to(device.name))
    for one in found:
        assert not one[[1, 3, 5]].any()
    assert not found[3][6].any()
    # The oracle reads classes of rows that do not count.
    case.target[[1, 5]] = -100
    if kind == "named":
        case.ids[[1, 3, 5]] = case.ids[[0, 0, 0]]
    case.check(found, upstream.nan_to_num(0, 0).double().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_of_weight_0_is_not_formed(device, dtype, kind):
    """It may be inf or NaN."""
    case = Case(device, kind, (4, 257), dtype, soft_weight=0.0, hard_weight=1.0)
    case.teacher[2:] = NAN
    found = case.run_with_gradient()
    assert not found[1].any()
    case.check(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_nearly_certain(device, kind):
    """Its gradient p - 1 is 1e-9, and lacks only what lies in the target's thread."""
    case = Case(device, kind, (2, 257), torch.float32, soft_weight=0.0, hard_weight=1.0)
    case.target[:] = 5
    case.logits[:, 5] = 30
    found = case.run_with_gradient()[3][:, 5].double().cpu()
    expected = torch.from_numpy(case.truth()[3][:, 5])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_upstreams(device, dtype, kind):
    case = Case(device, kind, (7, 257), dtype, beta=0.3, **ALL)
    for grad in (torch.tensor(-0.7), torch.linspace(-1, 2, 14)[::2]):
        grad = grad.to(real_of(dtype))
        case.check(case.run_with_gradient(grad.to(device.name)), grad.double().numpy())


# Rows at a vector's boundary and past it; blocks in order and in reverse, as a GPU has none.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("vocab", [31, 2049])
def test_a_gradient_in_place(device, dtype, vocab, aligned, kind, monkeypatch):
    """It has the bits of one apart, and nothing is written beside the logits."""
    case = Case(device, kind, (7, vocab), dtype, beta=0.3, **ALL)
    apart = case.run_with_gradient()
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("NEGLOG_REVERSED", "1")
        memory = torch.full((9, vocab + 40), 7.0, dtype=dtype, device=device.name)
        start = 16 // dtype.itemsize if aligned else 3
        logits = memory[1:-1, start : start + vocab]
        logits.copy_(case.logits)
        losses = case.run(None, logits, logits)
        case.check((*losses, logits))
        same = case.run_with_gradient()
        equal(same, apart)
        logits.fill_(7.0)
        assert bool((memory == 7.0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_has_the_bits_of_apart(device, dtype, kind):
    case = Case(device, kind, (7, 2049), dtype, beta=1.0, **ALL)
    case.logits = case.logits.contiguous()
    apart = case.run_with_gradient()
    over = case.logits.clone().to(device.name)
    equal((*case.run(None, over, over), over), apart)


# More rows than blocks, so that a block's shared memory comes from the row before.
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(device, kind):
    for shape in ((300, 31), (40, 1100)):
        case = Case(device, kind, shape, torch.float32, hard_weight=0.3, temperature=2.0)
        found = case.run_with_gradient()
        case.check(found)
        equal(case.run_with_gradient(), found)


def named(case, logs, ids):
    """The case with these named classes in each row."""
    case.teacher = (
        torch.tensor(logs, dtype=torch.float64).to(case.dtype).expand(len(case.logits), -1)
    )
    case.ids = torch.tensor(ids).expand(len(case.logits), -1)
    return case


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_named_classes(device, dtype, beta, hard_weight):
    """One; the last; all; none; some of probability 0, whose ids may be anything; all the mass."""
    how = {"beta": beta, "temperature": 2.0, "hard_weight": hard_weight}
    for vocab in (7, 301):
        case = Case(device, "named", (3, vocab), dtype, **how)
        case.target = torch.tensor([0, vocab - 1, 3])
        every = normal(vocab, seed=5).log_softmax(0).to(dtype).double()
        for logs, ids in (
            ([-0.5], [vocab - 1]),
            (every.tolist(), torch.arange(vocab).flip(0).tolist()),
            ([-INF, -INF], [0, vocab]),
            ([-1.0, -INF, -1.5, -INF], [3, 3, 0, -7]),
            ([-0.001, -10.0], [3, 0]),
        ):
            found = named(case, logs, ids).run_with_gradient()
            case.check(found)
        if beta != 1:  # from which KL(p | q) is inf
            found = named(case, [0.0], [3]).run_with_gradient()
            case.check(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_named_classes_far_above_the_others(device, dtype):
    """What they differ by is not lost in a difference of 1e4."""
    for beta in BETAS[:2]:
        case = Case(device, "named", (1, 300), dtype, beta=beta)
        case.logits[0, :3] = torch.tensor([0.1, -1.3, 0.7])  # near 1e4 they would be rounded
        case.logits[0, 3:] -= 1e4
        logs = torch.tensor([0.2, 0.5, -0.1]).double().log_softmax(0)
        case.check(named(case, logs.tolist(), [0, 1, 2]).run_with_gradient())


def test_others_that_are_impossible(device, dtype):
    """To the student, of which the teacher may say something else."""
    for beta in BETAS[:2]:
        case = Case(device, "named", (1, 31), dtype, beta=beta, hard_weight=0.5)
        case.logits[0, 3:] = -INF
        case.target[0] = 1
        for logs in ([-0.5, -1.5, -2.0], [-1.0, -2.0, -3.0]):
            case.check(named(case, logs, [2, 0, 1]).run_with_gradient())


def test_many_named_classes(device, dtype):
    for count in (257, 1024):
        case = Case(device, "named", (3, 2049), dtype, beta=0.3, hard_weight=0.5)
        case.teacher, case.ids = teacher("named", (3, 2049), dtype, count=count)
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        case.teacher, case.ids = case.teacher[:, shuffled], case.ids[:, shuffled]
        case.check(case.run_with_gradient())


# Within one vector and over several.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", [9, 300])
def test_extremes(device, dtype, vocab, beta, kind):
    """-inf in the student, in the teacher, in both; scores of 1e4; NaN; all of -inf."""
    students = [[-INF], [1e4], [-1e4], [1e4, -1e4], [0.0, -INF], [-INF, -INF], [NAN], [0.0, NAN]]
    teachers = [[0.0], [1e4, 1e4], [0.0], [-1e4, -1e4], [-INF], [-INF], [0.0], [0.0, -INF]]
    case = Case(device, kind, (9, vocab), dtype, beta=beta, hard_weight=0.5)
    case.target[:] = vocab - 1
    for row, start in zip(case.logits, students, strict=False):
        row[: len(start)] = torch.tensor(start)
    case.logits[8] = -INF
    if kind == "scores":
        for row, start in zip(case.teacher, teachers, strict=False):
            row[: len(start)] = torch.tensor(start)
        case.teacher[2] += 1e4
    elif kind == "probabilities":
        case.teacher[4:6, 0] = 0
    else:
        case.ids[:, 0], case.ids[:, 1:] = 0, torch.arange(4, 8)
        case.teacher[5, 0] = -INF
    case.check(case.run_with_gradient())


def by_torch(logits, q, beta, temperature):
    """As trainers write it: divergences from the log-probabilities q, and their sum's gradient."""
    leaf = logits.detach().requires_grad_()
    p = (leaf / temperature).log_softmax(1)
    if beta in (0, 1):
        given = (p, q) if beta == 0 else (q, p)
        found = F.kl_div(*given, reduction="none", log_target=True)
    else:
        m = torch.logaddexp(q + torch.tensor(beta).log(), p + torch.tensor(1 - beta).log())
        found = beta * F.kl_div(m, q, reduction="none", log_target=True)
        found = found + (1 - beta) * F.kl_div(m, p, reduction="none", log_target=True)
    found = found.sum(1)
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


# Apart, close to each other, both large, one of them large, and certain.
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("how", ["apart", "close", "large", "far", "certain"])
def test_the_error_is_no_larger_than_that_of_torch(device, how, beta):
    case = Case(device, "scores", (8, 4099), torch.float32, beta=beta, temperature=2.0)
    case.target[:] = 0
    if how == "close":
        case.teacher = (case.logits.double() + 1e-2 * normal(8, 4099, seed=9)).float()
    elif how == "large":
        case.logits, case.teacher = (x + 1e4 for x in (case.logits, case.teacher))
    elif how == "far":
        case.logits = case.logits + 1e4
    elif how == "certain":
        case.logits[:, 5], case.teacher[:, 5] = 40, 38
    found, expected = case.run_with_gradient(), case.truth()
    q = (case.teacher / 2).log_softmax(1)
    for ours, theirs, true in zip(
        found[1::2], by_torch(case.logits, q, beta, 2.0), expected[1::2], strict=True
    ):
        true = torch.from_numpy(true)
        error, allowed = ((x.double().cpu() - true).abs().max() for x in (ours, theirs))
        assert error <= 1.5 * allowed + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_any_order(device, dtype, kind, monkeypatch):
    case = Case(device, kind, (7, 2049), dtype, beta=0.3, **ALL)
    found = case.run_with_gradient()
    equal(case.run_with_gradient(), found)
    monkeypatch.setenv("NEGLOG_REVERSED", "1")
    equal(case.run_with_gradient(), found)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_adjacent(device, kind):
    case = Case(device, kind, (5, 257), torch.float32, hard_weight=0.5)
    case.logits, case.teacher = case.logits.contiguous(), case.teacher.contiguous()
    expected = case.run_with_gradient()
    for name in ("logits", "teacher", "ids"):
        if getattr(case, name) is not None:
            setattr(case, name, getattr(case, name).t().contiguous().t())
    case.target = case.target.repeat_interleave(2)[::2]
    equal(case.run(), expected[:3])
    gradient = torch.empty(5, 257, device=device.name)
    equal((*case.run(None, gradient), gradient), expected)


def test_nothing(device):
    for kind in KINDS:
        case = Case(device, kind, (0, 5), torch.float32)
        assert [x.shape for x in case.run_with_gradient()] == [(0,), (0,), (0,), (0, 5)]


def test_what_does_not_fit_is_refused(device):
    case = Case(device, "named", (7, 31), torch.float32)
    ones = torch.ones(7, device=device.name)
    logits = case.logits.to(device.name)
    for wrong in (ones[:6], ones.double(), ones[:, None]):
        with pytest.raises(RuntimeError, match="grad: expected"):
            case.run(wrong)
    for wrong in (logits[:6], logits[:, :30], logits.double(), logits.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="gradient: expected"):
            case.run(None, wrong)
    for name, wrongs in {
        "teacher": [case.teacher[:6], case.teacher[:, 1:], case.teacher[0]],
        "ids": [case.ids.int(), case.ids[:6], case.ids[0]],
        "target": [case.target.int(), case.target[:6], case.target[:, None]],
        "token_weight": [torch.ones(6), torch.ones(7).double(), torch.ones(())],
        "logits": [case.logits[0]],
    }.items():
        kept = getattr(case, name)
        for wrong in wrongs:
            setattr(case, name, wrong)
            with pytest.raises(RuntimeError, match=f"{name}: expected"):
                case.run()
        setattr(case, name, kept)
    case.teacher = case.teacher.long()
    with pytest.raises(RuntimeError, match="expected a float"):
        case.run()


def test_more_classes_than_shared_memory_has_bits(device):
    case = Case(device, "named", (1, 2_000_000), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"ids: 5 of 2000000 classes need .* shared memory"):
        case.run()


def end_of_child(what):
    """The signal that ends a process of its own in which `what` is called; 0 for none."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.close(2)  # where an assertion is printed
        try:
            what()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


# A GPU's assertion would end the tests. Python fears that a thread of torch's holds a lock.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_what_the_device_asserts(device):
    def ended(logs, ids, target=0, **options):
        case = named(Case(device, "named", (1, 31), torch.float32, **options), logs, ids)
        case.target[:] = target
        return end_of_child(case.run)

    assert ended([-1.0, -2.0], [3, 30]) == 0
    assert ended([0.04, -INF], [3, 31], target=31) == 0  # of 16 bits the sum may be 1.04
    for wrong in (([-1.0], [31]), ([-1.0], [-1]), ([-1.0, -2.0], [3, 3]), ([-0.5, -0.7], [3, 4])):
        assert ended(*wrong) == signal.SIGABRT
    for target in (31, -1):
        assert ended([-1.0], [3], target, hard_weight=0.5) == signal.SIGABRT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_the_ops_made_of_it(device, dtype, reduction, kind, monkeypatch):
    """neglog::kl and neglog::kl_backward, and the host does not wait."""
    monkeypatch.setattr(cuda, "ops", device.ops)
    case = Case(device, kind, (7, 131), dtype, beta=0.3, **ALL)
    case.token_weight = torch.linspace(-1, 3, 7, dtype=real_of(dtype))
    tensors, options = case.tensors(), case.values()
    with Waits():
        loss, total, *parts = cuda._forward(
            forward.Arguments(*tensors, None, reduction, *options, "")
        )
        upstream = torch.full_like(loss, 0.7)
        gradient = cuda._backward(
            backward.Arguments(upstream, *tensors, total, reduction, *options, "")
        )
    rows = case.truth()
    counted = case.token_weight[case.target != -100]
    divisor = float(counted.double().sum()) if reduction == MEAN else 1.0
    expected = rows[0] if reduction == NONE else rows[0].sum() / divisor
    assert off(loss, expected) <= LOSS[dtype]
    for found, true in zip(parts, rows[1:3], strict=True):
        assert off(found, true) <= LOSS[dtype]
    assert off(gradient, rows[3] * 0.7 / divisor) <= GRADIENT[dtype]
