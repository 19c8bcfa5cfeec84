"""The schedule of linear_nll over the CUDA kernels: on a GPU and, emulated, on the CPU."""

import pytest
import torch

from neglog import dispatch, torch_state
from neglog.ops.linear_nll import schedule as linear_schedule
from neglog.ops.linear_nll import schema as linear_schema
from neglog.ops.linear_nll.cuda import CudaRows
from tests.support.cuda_devices import (
    GRADIENT,
    LOSS,
    MEAN,
    NONE,
    OPTIONS,
    SUM,
    Waits,
    normal,
    off,
    real_of,
)

NAN = float("nan")


def linear_forward(*arguments):
    return linear_schedule.forward(CudaRows, linear_schema.forward.Arguments(*arguments))


def linear_backward(*arguments):
    return linear_schedule.backward(CudaRows, linear_schema.backward.Arguments(*arguments))


# Statistics keep rows apart, a reduction forms gradients in the forward, the filter leaves tiles
# out.
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-12])
def test_linear_nll_is_what_the_cpu_has(device, dtype, options, reduction, stats, filter_eps):
    rows, features, vocab = 150, 6, 40
    real = real_of(dtype)
    parts = (normal(rows, features), normal(vocab, features, seed=1), normal(vocab, seed=2))
    target = torch.arange(rows) % vocab
    target[::7] = -100
    weight = (normal(vocab, seed=3).abs() + 0.5).to(real)
    fixed = [*(x.to(dtype) for x in parts), target, weight]
    wanted = [reduction != NONE] * 3
    tail = (reduction, -100, *options)

    def run(place, forward, backward):
        given = [x.to(place) for x in fixed]
        outputs = forward(*given, None, None, *tail, stats, wanted, 1, dtype, filter_eps, "")
        grad = normal(*outputs[0].shape, seed=5).to(real).to(place)
        grad_lse, grad_entropy = normal(2, rows, seed=6).to(real).to(place)
        grads = []
        for through in ((None, None), (grad_lse, None), (None, grad_entropy)):
            made = backward(
                grad, *through, *given, None, outputs[2], *outputs[6:], *tail, [True] * 3, 1, dtype,
                filter_eps, "",
            )  # fmt: skip
            grads += made
        return outputs, grads

    cpu = torch.ops.neglog
    expected, exact = run("cpu", cpu.linear_nll, cpu.linear_nll_backward)
    with dispatch.record() as ran:
        found, grads = run(device.name, linear_forward, linear_backward)
    assert set(ran) == {"linear_nll:cuda", "linear_nll_backward:cuda"}
    for one, other in zip(found[:6], expected, strict=False):
        assert one.dtype == other.dtype
        assert off(one, other) <= 10 * LOSS[dtype]
    for one, other in zip([*found[6:], *grads], [*expected[6:], *exact], strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 3 * GRADIENT[dtype]


# As above: each has other code while a graph is captured.
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_linear_nll_while_a_graph_is_captured(device, dtype, reduction, stats, monkeypatch):
    """Nothing is asked of the device, and what does not count may be NaN."""
    x, w, b = normal(150, 6), normal(40, 6, seed=1), normal(40, seed=2)
    target = torch.arange(150) % 40
    target[::7] = -100
    x[::7] = NAN
    given = [t.to(device.name) for t in (*(t.to(dtype) for t in (x, w, b)), target)]
    tail = (reduction, -100, *OPTIONS["all"])
    wanted = [reduction != NONE] * 3
    grad = normal(*([150] if reduction == NONE else []), seed=5).to(real_of(dtype)).to(device.name)

    def run():
        tiles = (1 << 14, dtype, 0.0, "")
        outputs = linear_forward(*given, None, None, None, *tail, stats, wanted, *tiles)
        kept = (*given, None, None, outputs[2], *outputs[6:])
        grads = linear_backward(grad, None, None, *kept, *tail, [True] * 3, *tiles)
        return *outputs, *grads

    expected = run()
    monkeypatch.setattr(torch_state, "capturing", lambda device: True)
    with Waits():
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 3 * GRADIENT[dtype]


def test_linear_nll_of_nothing(device):
    given = [torch.zeros(shape, device=device.name) for shape in ((3, 2), (5, 2), (5,))]
    target = torch.full((3,), -100, device=device.name)
    for reduction, expected in ((MEAN, NAN), (SUM, 0.0)):
        loss, *_, dx, dw, db = linear_forward(
            *given, target, None, None, None, reduction, -100, *OPTIONS["plain"], False,
            [True] * 3, 1, torch.float32, 0.0, "",
        )  # fmt: skip
        assert off(loss, expected) == 0
        assert not any(x.any() for x in (dx, dw, db))
