"""Loss and gradient in one pass, for an upstream that is remembered on the device: on a GPU and,
emulated, on the CPU.

The gradient must have the bits of nll_backward, whether it was formed in the forward or again.
"""

import pytest
import torch

from tests.csrc.test_nll import INF, NAN, ON_CHIP, SHAPES, problem, truth, weighted_problem
from tests.support.cuda_devices import GRADIENT, LOSS, MEAN, OPTIONS, SUM, off, real_of


class Call:
    """The two ops over one input, with their numbers on the device."""

    def __init__(
        self, device, logits, target, weight, options=OPTIONS["plain"], reduction=MEAN,
        token_weight=None,
    ):  # fmt: skip
        self.ops, self.name = device.ops, device.name
        self.logits = logits
        self.inputs = (logits, target, weight, token_weight)
        self.values = (reduction, -100, *options)
        self.real = real_of(logits.dtype)

    def number(self, value):
        return torch.tensor(value, dtype=self.real, device=self.name)

    def remembered(self, upstream, misses=0):
        return torch.tensor([upstream, misses], dtype=self.real, device=self.name)

    def forward(self, remembered=None, form=True, num_items=None):
        given = (*self.inputs, num_items, remembered)
        loss, self.kept, gradient = self.ops.nll_with_gradient(*given, *self.values, form)
        rows = len(self.logits)
        self.lse, self.low, _ = self.kept[:-2].view(3, rows)
        self.total, self.formed_for = self.kept[-2:]
        return loss, gradient

    def gradient_for(self, gradient, upstream, remembered=None, formed=True):
        given = (gradient, upstream, self.kept, remembered, *self.inputs)
        self.ops.nll_gradient_for_(*given, *self.values, formed)

    def by_two_passes(self, upstream):
        given = (*self.inputs, self.lse, self.low, None, self.total)
        return self.ops.nll_backward(upstream, None, None, *given, *self.values, "")


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# As in test_nll.py, which has the reasons. Two upstreams: one that is remembered, and none.
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_two_passes(device, dtype, shape, options, probabilities):
    inputs = problem(shape, dtype, probabilities, device.name)
    for reduction, upstream in ((MEAN, 0.7), (SUM, None)):
        call = Call(device, *inputs, options, reduction)
        remembered = None if upstream is None else call.remembered(upstream)
        loss, gradient = call.forward(remembered)
        one, lse, low, total, *_ = device.ops.nll(*inputs, None, None, *call.values, False, "")
        for found, expected in zip(
            (loss, call.lse, call.low, call.total), (one, lse, low, total), strict=True
        ):
            equal(found, expected)
        used = call.number(upstream or 1.0)
        equal(call.formed_for, used)
        equal(gradient, call.by_two_passes(used))
        name = {MEAN: "mean", SUM: "sum"}[reduction]
        expected = truth(*inputs, options, reduction=name)
        assert off(loss, expected.loss) <= LOSS[dtype]
        assert off(gradient, expected.grad * float(used)) <= GRADIENT[dtype]


# Rows in shared memory of one block and of clusters, and rows that are not held because they lie
# at other places of a vector than the gradient's; blocks in order and in reverse.
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_bytes", ON_CHIP.values(), ids=ON_CHIP.keys())
def test_rows_on_chip(device, dtype, row_bytes, reverse, held, monkeypatch):
    if reverse:
        monkeypatch.setenv("NEGLOG_REVERSED", "1")
    vocab = row_bytes // dtype.itemsize + 5
    given, target, weight = problem((4, vocab), dtype, False, device.name)
    logits = given.contiguous() if held else given  # which has a stride of vocab + 3
    logits[1] = NAN
    logits[2, ::2] = -INF
    target[:] = torch.tensor([vocab - 1, -100, 1, vocab // 2])
    options = (0.0, *OPTIONS["all"][1:])
    call = Call(device, logits, target, weight, options, SUM)
    remembered = call.remembered(3.0)
    loss, gradient = call.forward(remembered)
    lse = call.lse.clone()
    equal(gradient, call.by_two_passes(call.number(3.0)))
    assert not gradient[1].any()
    expected = truth(logits, target, weight, options, reduction="sum")
    assert off(loss, expected.loss) <= 10 * LOSS[dtype]
    assert off(gradient, 3 * expected.grad) <= GRADIENT[dtype]
    # The same bits where no gradient is formed, and those of nll but for the order of a cluster.
    unformed, nothing = call.forward(remembered, form=False)
    assert nothing.shape == (0, 0)
    equal(unformed, loss)
    equal(call.lse, lse)
    unexpected, _ = call.forward(call.remembered(3.0, misses=2))
    assert call.formed_for.isnan()
    equal(unexpected, loss)
    equal(call.lse, lse)
    if not held or row_bytes == ON_CHIP["one"]:
        alone = device.ops.nll(logits, target, weight, None, None, *call.values, False, "")
        equal((loss, lse), (alone[0], alone[1]))


# A block, and a cluster of two, that take several rows in turn, each at another alignment: the next
# row is copied while this one is written, unless it is ignored. A row of the least vectors too.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_bytes", [32 << 10, 33 << 10, 75 << 10], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_on_chip(device, dtype, row_bytes, reverse, monkeypatch):
    if reverse:
        monkeypatch.setenv("NEGLOG_REVERSED", "1")
    vocab = row_bytes // dtype.itemsize + 1
    given, target, weight = problem((53, vocab), dtype, False, device.name)
    logits = given.contiguous()
    target[::3] = target[16:20] = -100
    logits[target == -100] = NAN
    call = Call(device, logits, target, weight, reduction=SUM)
    loss, gradient = call.forward(call.remembered(3.0))
    expected = truth(logits, target, weight, OPTIONS["plain"], reduction="sum")
    assert off(loss, expected.loss) <= LOSS[dtype]
    equal(gradient, call.by_two_passes(call.number(3.0)))
    assert off(gradient, 3 * expected.grad) <= GRADIENT[dtype]
    over = logits.clone()
    again, *_ = device.ops.nll_(over, target, weight, None, None, *call.values, False, "")
    equal(again, loss)
    _, ones = call.forward()
    equal(over, ones)


# Rows that weigh 0, and so are ignored, are next to rows that do not.
@pytest.mark.parametrize("row_bytes", [33 << 10, 75 << 10], ids=str)
def test_many_rows_on_chip_with_weights(device, dtype, row_bytes):
    logits, target, weight = problem((53, row_bytes // dtype.itemsize), dtype, False, device.name)
    token_weight = torch.linspace(-1, 2, 53, dtype=real_of(dtype), device=device.name)
    token_weight[::3] = token_weight[16:20] = 0
    logits, zero = logits.contiguous(), token_weight == 0
    logits[zero], target[zero] = NAN, -1
    inputs = (logits, target, weight, OPTIONS["plain"])
    call = Call(device, *inputs, SUM, token_weight)
    loss, gradient = call.forward(call.remembered(3.0))
    expected = truth(*inputs, token_weight, reduction="sum")
    assert off(loss, expected.loss) <= LOSS[dtype]
    equal(gradient, call.by_two_passes(call.number(3.0)))
    assert off(gradient, 3 * expected.grad) <= GRADIENT[dtype]


# As above, and other upstreams than the one that is remembered.
@pytest.mark.parametrize("kind", ["plain", "smoothing", "probabilities"])
@pytest.mark.parametrize("vocab", [31, 9001])
@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_weights_of_rows(device, dtype, reduction, vocab, kind):
    logits, target, weight, token_weight = weighted_problem(
        (7, vocab), dtype, kind == "probabilities", device.name
    )
    inputs = (logits.contiguous(), target, weight, OPTIONS.get(kind, OPTIONS["all"]))
    call = Call(device, *inputs, reduction, token_weight)
    loss, gradient = call.forward(call.remembered(3.0))
    expected = truth(*inputs, token_weight, reduction={MEAN: "mean", SUM: "sum"}[reduction])
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(call.total, expected.total_weight) <= LOSS[dtype]
    assert off(gradient, 3 * expected.grad) <= GRADIENT[dtype]
    equal(gradient, call.by_two_passes(call.number(3.0)))
    for upstream in (0.7, INF):
        call.gradient_for(gradient, call.number(upstream))
        equal(gradient, call.by_two_passes(call.number(upstream)))
        assert not gradient[1].any()
        assert not gradient[5].any()


# Whole rows on chip, short rows, and rows that need a second pass.
@pytest.mark.parametrize("kind", ["plain", "smoothing", "probabilities"])
@pytest.mark.parametrize("shape", [(7, 31), (3, 9001)], ids=str)
def test_another_upstream(device, dtype, shape, kind):
    """It forms the gradient again, in the same memory; the one it was formed for writes nothing."""
    inputs = problem(shape, dtype, kind == "probabilities", device.name)
    call = Call(device, *inputs, OPTIONS.get(kind, OPTIONS["all"]))
    remembered = call.remembered(0.5)
    _, gradient = call.forward(remembered)
    handed_over = gradient.clone()
    gradient.fill_(7)
    call.gradient_for(gradient, call.number(0.5), remembered)
    assert bool((gradient == 7).all())
    assert remembered.tolist() == [0.5, 0]
    for other in (0.0, -0.0, INF, NAN, 2.0, -0.5, 1e30):
        gradient.fill_(7)
        call.gradient_for(gradient, call.number(other))
        equal(gradient, call.by_two_passes(call.number(other)))
    # Formed for what is remembered now, whatever that is when the backward comes.
    _, gradient = call.forward(remembered)
    remembered.fill_(4)
    call.gradient_for(gradient, call.number(0.5))
    equal(gradient, handed_over)


def test_what_is_remembered(device, dtype):
    """Two misses end the forming, until an upstream is that of the one before it."""
    call = Call(device, *problem((2, 31), dtype, False, device.name))
    state = call.remembered(1.0)
    steps = [  # what comes; what is remembered then
        (1.0, (1, 0)), (2.0, (2, 1)), (2.0, (2, 0)), (0.5, (0.5, 1)), (INF, (0.5, 2)),
        (0.5, (0.5, 0)), (0.0, (0.5, 1)), (NAN, (0.5, 2)), (4.0, (4, 3)), (8.0, (8, 4)),
        (8.0, (8, 0)),
    ]  # fmt: skip
    for upstream, expected in steps:
        before, misses = state.tolist()
        _, gradient = call.forward(state)
        equal(call.formed_for, call.number(before if misses < 2 else NAN))
        call.gradient_for(gradient, call.number(upstream), state)
        equal(gradient, call.by_two_passes(call.number(upstream)))
        assert state.tolist() == list(expected)


def test_memory_that_holds_no_gradient_yet(device, dtype):
    call = Call(device, *problem((7, 257), dtype, False, device.name))
    upstream = call.number(1.0)
    _, gradient = call.forward()
    new = torch.full_like(gradient, 7)
    call.gradient_for(new, upstream, formed=False)
    equal(new, gradient)
    call.forward(form=False)
    again = torch.full_like(gradient, 7)
    call.gradient_for(again, upstream, formed=False)
    equal(again, gradient)


def test_a_mean_over_a_number_that_is_given(device, dtype):
    logits, target, weight = problem((7, 257), dtype, False, device.name)
    call = Call(device, logits, target, weight)
    items = call.number(40.0)
    loss, gradient = call.forward(call.remembered(2.0), num_items=items)
    expected = truth(logits, target, weight, OPTIONS["plain"], reduction="sum")
    assert off(loss, expected.loss / 40) <= LOSS[dtype]
    assert off(gradient, expected.grad / 20) <= GRADIENT[dtype]
    call.gradient_for(gradient, call.number(1.0))
    equal(gradient, call.by_two_passes(call.number(1.0)))
    assert off(gradient, expected.grad / 40) <= GRADIENT[dtype]


def test_a_loss_scale_reaches_float16_before_it_is_divided(device):
    """4096 times 1e-4 / 4096: each alone is within float16, 1e-4 / 4096 is not."""
    logits = torch.zeros(1, 10000, dtype=torch.float16, device=device.name)
    call = Call(device, logits, torch.zeros(1, dtype=torch.int64, device=device.name), None)
    _, gradient = call.forward(call.remembered(4096.0), num_items=call.number(4096.0))
    assert off(gradient[0, 1:], torch.full((9999,), 1e-4, dtype=torch.float64)) <= 1e-6
    assert bool(gradient.all())


@pytest.mark.parametrize("probabilities", [False, True])
def test_nothing(device, probabilities):
    """No rows, or rows without columns, whose memory has no address."""
    for rows, vocab in ((0, 5), (3, 0), (0, 0)):
        logits = torch.empty(rows, vocab, device=device.name)
        target = torch.empty(rows, vocab) if probabilities else torch.full((rows,), -100)
        call = Call(device, logits, target.to(device.name), None)
        loss, gradient = call.forward(call.remembered(1.0))
        expected, *_ = device.ops.nll(*call.inputs, None, *call.values, False, "")
        equal(loss, expected)
        assert gradient.shape == (rows, vocab)
        call.gradient_for(gradient, call.number(2.0), call.remembered(1.0))


def test_rows_that_are_all_ignored(device, dtype):
    """A mean over nothing is NaN, and its gradient is 0."""
    logits = torch.full((3, 31), NAN, dtype=dtype, device=device.name)
    call = Call(device, logits, torch.full((3,), -100, device=device.name), None)
    loss, gradient = call.forward()
    assert loss.isnan()
    assert not gradient.any()
    gradient.fill_(7)
    call.gradient_for(gradient, call.number(2.0))
    assert not gradient.any()


def test_columns_that_are_not_adjacent(device):
    given, target, weight = problem((5, 257), torch.float32, False, device.name)
    expected = Call(device, given.contiguous(), target, weight).forward()
    call = Call(device, given.t().contiguous().t(), target, weight)
    loss, gradient = call.forward()
    equal((loss, gradient), expected)
    call.gradient_for(gradient, call.number(2.0))
    equal(gradient, 2 * expected[1])


def test_what_does_not_fit_is_refused(device):
    call = Call(device, *problem((7, 31), torch.float32, False, device.name))
    _, gradient = call.forward()
    one = call.number(1.0)
    for wrong in (gradient[:6], gradient.double(), gradient.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="gradient: expected"):
            call.gradient_for(wrong, one)
    with pytest.raises(RuntimeError, match="grad_loss: expected"):
        call.gradient_for(gradient, one.double())
    for wrong in (one, torch.ones(3, device=device.name), torch.ones(4, device=device.name)[::2]):
        with pytest.raises(RuntimeError, match="remembered: expected"):
            call.forward(wrong)
    call.kept = call.kept[:-1]
    with pytest.raises(RuntimeError, match="kept: expected"):
        call.gradient_for(gradient, one)
    call.values = (0, *call.values[1:])
    with pytest.raises(RuntimeError, match="reduction: expected"):
        call.forward()
