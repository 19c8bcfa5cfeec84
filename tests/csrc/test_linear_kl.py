"""The schedule of linear_kl over the CUDA kernel: on a GPU and, emulated, on the CPU."""

import pytest
import torch

from neglog.ops.kl import cuda
from neglog.ops.linear_kl import schedule, schema
from neglog.ops.linear_nll.cpu import CpuRows
from tests.support.cuda_devices import GRADIENT, LOSS, MEAN, NONE, normal, off, real_of

ROWS, WIDTH, VOCAB = 150, 6, 40
NUMBERS = (0.3, 1.5, 0.7, 0.4, 0.8, 9.0, 0.6, 0.0)


@pytest.fixture
def on_device(device, monkeypatch):
    """Where tensors lie, and a context in which the schedule's kernel is that of the device."""
    monkeypatch.setattr(cuda, "ops", device.ops)

    def use():
        monkeypatch.setitem(schedule.RUN, "cpu", cuda.run_rows)

    return device.name, use


def given(dtype, kind):
    """Student and teacher, a target of which some do not count, weights of rows."""
    student = (normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=1), normal(VOCAB, seed=2))
    states, head = normal(ROWS, 4, seed=3), normal(VOCAB, 4, seed=4)
    if kind == "hidden states":
        teacher = (states, head, None, None)
    else:
        found = (states @ head.t()).log_softmax(1).topk(5, 1)
        teacher = (found.values - 0.01, None, None, found.indices)
    target = torch.arange(ROWS) % VOCAB
    target[::7] = -100
    weight = normal(ROWS, seed=5).abs().to(real_of(dtype))
    tensors = [
        x.to(dtype) if x is not None and x.is_floating_point() else x for x in (*student, *teacher)
    ]
    return [*tensors, target, weight]


@pytest.mark.parametrize("kind", ["hidden states", "named"])
@pytest.mark.parametrize("reduction", [NONE, MEAN])
@pytest.mark.parametrize("compact", [True, False])
def test_linear_kl_is_what_the_cpu_has(on_device, dtype, kind, reduction, compact, monkeypatch):
    place, use = on_device
    fixed = given(dtype, kind)
    options = (reduction, -100, False, *NUMBERS)
    tiles = (1, dtype, 0.0, "")

    def run(place):
        tensors = [None if x is None else x.to(place) for x in fixed]
        wanted = [reduction != NONE] * 3
        made = schedule.forward(schema.forward.Arguments(*tensors, None, *options, wanted, *tiles))
        grad = normal(*made[0].shape, seed=6).to(real_of(dtype)).to(place)
        grads = schedule.backward(
            schema.backward.Arguments(
                grad, *tensors, made[1], *made[-3:], *options, [True] * 3, *tiles
            )
        )
        return made[:4], [*made[4:], *grads]

    expected, exact = run("cpu")
    use()
    if not compact:  # as while a graph is captured; what does not count may be NaN
        monkeypatch.setattr(CpuRows, "compacts", staticmethod(lambda device: False))
        ignored = fixed[7] == -100
        fixed[0] = fixed[0].masked_fill(ignored[:, None], float("nan"))
        fixed[3] = fixed[3].masked_fill(ignored[:, None], float("nan"))
    found, grads = run(place)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 10 * LOSS[dtype]
    for one, other in zip(grads, exact, strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 3 * GRADIENT[dtype]
