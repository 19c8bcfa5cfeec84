"""Which upstream a gradient is formed for in the forward, and when none is formed."""

import threading

import pytest
import torch

import neglog
from neglog.ops.nll import remembered
from neglog.ops.nll.schema import MEAN, SUM

F32 = torch.float32


@pytest.fixture(autouse=True)
def nothing_remembered():
    remembered.forget()


def record(rows=6, dtype=F32, reduction=MEAN):
    return remembered.record(torch.Size((rows, 40)), dtype, reduction)


def step(upstream, **which):
    """A forward and its backward; for which upstream the gradient was formed."""
    formed = record(**which).forward()
    record(**which).backward(upstream)
    return formed


def test_the_upstream_of_the_last_backward_is_expected():
    assert [step(u) for u in (1.0, 8.0, 8.0, 8.0, 2.0, 2.0)] == [1.0, 1.0, 8.0, 8.0, 8.0, 2.0]


def test_one_that_changes_at_each_step_is_soon_expected_no_more():
    assert [step(1.0 / (1 + i)) for i in range(5)] == [1.0, 1.0, 0.5, None, None]
    # Until it is the same twice.
    assert [step(0.25) for _ in range(3)] == [None, None, 0.25]


def test_forwards_without_a_backward_end_it_until_one_comes():
    assert [step(2.0), step(2.0)] == [1.0, 2.0]
    assert [record().forward() for _ in range(4)] == [2.0, 2.0, None, None]
    record().backward(2.0)
    assert record().forward() == 2.0


def test_zero_and_nan_are_not_expected():
    for upstream in (0.0, -0.0, float("nan")):
        remembered.forget()
        formed = [step(upstream) for _ in range(4)]
        assert formed[2:] == [None, None]
        assert 0.0 not in formed


def test_calls_that_are_not_alike_expect_their_own():
    kinds = [{}, {"rows": 7}, {"dtype": torch.float64}, {"reduction": SUM}]
    for _ in range(3):
        for i, kind in enumerate(kinds):
            step(i + 2.0, **kind)
    assert [step(i + 2.0, **kind) for i, kind in enumerate(kinds)] == [2.0, 3.0, 4.0, 5.0]


def test_new_shapes_expect_the_last_upstream_of_any():
    step(8.0)
    assert [step(8.0, rows=rows) for rows in range(7, 12)] == [8.0] * 5
    assert step(8.0, rows=12, dtype=torch.float64) == 1.0


def test_new_shapes_that_get_no_backward_end_it_for_new_shapes_alone():
    step(1.0)
    assert [record(rows=rows).forward() for rows in range(7, 12)] == [1.0, 1.0, None, None, None]
    assert step(1.0) == 1.0
    assert record(rows=12).forward() is None
    record(rows=12).backward(1.0)
    assert [record(rows=12).forward(), record(rows=13).forward()] == [1.0, 1.0]


def test_the_shapes_that_were_used_last_are_kept():
    for rows in range(2 * remembered.KEPT):
        step(1.0, rows=rows)
        step(4.0, rows=10_000)
    assert remembered.record.cache_info().currsize == remembered.KEPT
    assert record(rows=10_000).upstream == 4.0


def test_threads():
    """Each trains a model with an upstream of its own."""
    logits, target = torch.randn(31, 40), torch.arange(31)
    expected = torch.autograd.functional.jacobian(
        lambda x: neglog.cross_entropy(x, target, backend="torch"), logits
    )
    wrong = []

    def train(upstream):
        x = logits.clone().requires_grad_()
        for _ in range(200):
            x.grad = None
            (upstream * neglog.cross_entropy(x, target)).backward()
            if not torch.allclose(x.grad, upstream * expected, rtol=1e-5, atol=1e-8):
                wrong.append(upstream)

    threads = [threading.Thread(target=train, args=(2.0**i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
