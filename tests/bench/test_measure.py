"""The check and the loop: what is timed, in which order, and what happens to a contender that
fails."""

import signal
import time
from typing import Any

import pytest
import torch

from neglog.bench import Mismatch
from neglog.bench.budget import Budget, time_limit
from neglog.bench.cases import load, pairs
from neglog.bench.check import check
from neglog.bench.clocks import CPUClock, CUDAClock
from neglog.bench.contender import Contender
from neglog.bench.measure import Plan, measure

SHAPE = {"rows": 200, "vocab": 1000}


@pytest.fixture(scope="module")
def problem():
    return load("cross_entropy").problem(SHAPE, "float32", 0)


@pytest.fixture
def eager(problem):
    return load("cross_entropy").contenders(problem)[0]


def calling(names: list[str], contender: Contender, name: str, **fields: Any) -> Contender:
    """The contender under another name, which is noted at each call with a gradient."""

    def loss(*arguments):
        if torch.is_grad_enabled():
            names.append(name)
        return contender.loss(*arguments)

    return contender._replace(name=name, label=name, loss=loss, **fields)


def failing(name="broken", library="another library") -> Contender:
    def loss(*_):
        raise RuntimeError("an illegal memory access\nand a long explanation")

    return Contender(name, name, loss, 1, library)


def changed(eager, change, **fields):
    return eager._replace(loss=lambda x, t: change(eager.loss(x, t), x), **fields)


def test_a_wrong_loss_or_gradient_is_no_match(problem, eager):
    leaves = problem.leaves
    assert check(eager, problem, leaves)[2:] == (pytest.approx(0, abs=1e-5), None)
    gradient = changed(eager, lambda loss, x: loss + 1e-3 * (x[0, 0] - x[0, 0].item()))
    assert "the gradient is off the float64" in check(gradient, problem, leaves).mismatch
    assert check(gradient._replace(check="loss"), problem, leaves).mismatch is None
    loss = changed(eager, lambda loss, _: loss * 1.01, check="loss")
    assert "the loss is off the float64 oracle" in check(loss, problem, leaves).mismatch
    undefined = changed(eager, lambda loss, _: loss * float("nan"))
    assert "the loss is off the float64 oracle" in check(undefined, problem, leaves).mismatch


def test_a_call_that_another_backend_answers_ends_the_run(problem, eager):
    with pytest.raises(Mismatch, match="expected cython, ran by none"):
        measure(problem, [eager._replace(backend="cython")], CPUClock(), Plan(rounds=1))


def test_contenders_are_timed_in_turn(problem, eager):
    calls = []
    contenders = [calling(calls, eager, name) for name in "ABC"]
    measured = measure(problem, contenders, CPUClock(), Plan(rounds=2))
    # The check, the round that warms up, two rounds, and the call for memory.
    assert "".join(calls) == "ABC" * 5
    assert [len(result.total) for result in measured.results] == [2, 2, 2]
    assert len(measured.yardstick) == 2


def test_one_that_overwrites_gets_copies(problem, eager):
    before = problem.leaves[0].detach().clone()

    def loss(logits, target):
        value = eager.loss(logits, target)
        logits.data.zero_()
        return value

    wrong = eager._replace(loss=loss, overwrites=True, check="loss")
    measure(problem, [wrong], CPUClock(), Plan(rounds=1, strict=False))
    assert torch.equal(problem.leaves[0], before)


def test_a_failure_ends_a_strict_run_unless_the_contender_is_optional(problem, eager):
    measured = measure(problem, [failing(), eager], CPUClock(), Plan(rounds=1))
    assert measured.left_out == {"broken": "failed: RuntimeError: an illegal memory access"}
    assert [result.contender.name for result in measured.results] == ["eager"]
    with pytest.raises(RuntimeError, match="illegal"):
        measure(problem, [failing(library="neglog"), eager], CPUClock(), Plan(rounds=1))


def test_a_lenient_run_keeps_the_others_and_says_what_is_wrong(problem, eager):
    wrong = eager._replace(name="wrong", loss=lambda x, t: eager.loss(x, t) * 2)
    contenders = [failing("neglog", "neglog"), wrong, eager]
    measured = measure(problem, contenders, CPUClock(), Plan(rounds=1, strict=False))
    assert set(measured.left_out) == {"neglog"}
    found = {result.contender.name: result.checked.mismatch for result in measured.results}
    assert found["eager"] is None
    assert "off the float64 oracle" in found["wrong"]


def test_brief_calls_fill_a_round(problem, eager):
    measured = measure(problem, [eager], CPUClock(), Plan(rounds=1, brief=True))
    assert measured.calls >= 5


def test_each_backward_has_the_next_upstream_and_its_gradient_is_checked(problem, eager):
    seen, upstreams = [], (0.25, 3.0)

    def loss(logits, target):
        made = eager.loss(logits, target)
        if torch.is_grad_enabled():
            made.register_hook(lambda upstream: seen.append(float(upstream)))
        return made

    contender = eager._replace(loss=loss, upstreams=upstreams)
    measured = measure(problem, [contender], CPUClock(), Plan(rounds=2))
    # The check and the call for memory have the first, the three rounds each in turn.
    assert seen == [0.25, 0.25, 3.0, 0.25, 0.25]
    assert measured.results[0].checked.error < 1e-5
    scaled = changed(contender, lambda loss, x: loss + 0.1 * (loss - loss.detach()))
    assert "the gradient is off" in check(scaled, problem, problem.leaves).mismatch


# All scores at once, and in parts of which the last is smaller.
@pytest.mark.parametrize("rows_at_once", [7, 3])
def test_the_three_matmuls_of_a_yardstick(rows_at_once, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 4, generator=generator) for n in (7, 5))
    monkeypatch.setattr(pairs, "SCORE_BYTES", rows_at_once * right.shape[0] * 4)
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: products.append(out) or multiply(*a, out=out))
    monkeypatch.setattr(
        torch, "addmm", lambda *a, add=torch.addmm, **b: products.append(add(*a, **b))
    )
    pairs.three_matmuls(left, right)()
    scores = left @ right.t()
    assert len(products) == 3 * -(-7 // rows_at_once)
    torch.testing.assert_close(products[-1], scores.t() @ left)
    torch.testing.assert_close(products[1], (scores @ right)[:rows_at_once])


def test_a_contender_is_skipped_when_the_seconds_are_used_up(problem, eager):
    late = eager._replace(name="late")
    slow = eager._replace(loss=lambda *a: (time.sleep(0.2), eager.loss(*a))[1])
    plan = Plan(rounds=1, strict=False, budget=Budget(0.1))
    measured = measure(problem, [slow, late], CPUClock(), plan)
    assert measured.left_out == dict.fromkeys(["late", "eager"], "skipped: no time left")


def test_a_contender_that_takes_too_long_is_given_up(problem, eager):
    endless = failing()._replace(loss=lambda *_: time.sleep(5))
    before = signal.getsignal(signal.SIGALRM)
    plan = Plan(rounds=1, strict=False, limit=0.05)
    measured = measure(problem, [endless], CPUClock(), plan)
    assert measured.left_out["broken"].startswith("failed: TooLong: given up")
    assert signal.getsignal(signal.SIGALRM) is before


def test_no_limit_sets_no_alarm():
    with time_limit(float("inf")):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_slow_call_has_fewer_rounds_on_a_gpu():
    clock = CUDAClock()
    assert [clock.rounds(15, seconds) for seconds in (1e-9, 0.1, 1.2, 9.0)] == [15, 15, 5, 3]
    assert CPUClock().rounds(9, 100.0) == 9
