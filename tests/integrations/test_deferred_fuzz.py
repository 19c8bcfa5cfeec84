"""Whatever a user does with logits gives the same with deferred ones: values, gradients, dtype,
shape, strides, memory that is shared, types of errors."""

from __future__ import annotations

import pytest
import torch

from tests.support.deferred import gradients, losses, programs, reads, views
from tests.support.deferred.given import (
    STARTS,
    Case,
    Start,
    compare_outcomes,
    given,
    outcome,
)  # fmt: skip

TABLES = {"reads": reads, "views": views, "losses": losses, "gradients": gradients}
CASES = {
    f"{table}: {name}": case
    for table, module in TABLES.items()
    for name, case in module.CASES.items()
}
PROGRAMS, PER_TEST = 2000, 100


def differences(case: Case, start: Start) -> list[str]:
    """Of a weighted sum of the results, and of a cross-entropy of them and of the logits."""
    found = []
    for as_logits in (False, True):
        expected = outcome(case, given(start, deferred=False), as_logits)
        got = outcome(case, given(start, deferred=True), as_logits)
        try:
            compare_outcomes(got, expected, **start.tolerance)
        except AssertionError as error:
            found.append(f"as_logits={as_logits}: {error}")
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: the time is that of threads that start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Each start has its own recipe or other parts that require a gradient; all of them in one test, as
# what differs in one differs in most.
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_alike(case):
    found = {name: differences(case, start) for name, start in STARTS.items()}
    assert not any(found.values()), "\n".join(f"{k}: {d}" for k, v in found.items() for d in v)


@pytest.mark.parametrize("first", range(0, PROGRAMS, PER_TEST))
def test_programs(first):
    for seed in range(first, first + PER_TEST):
        program = programs.drawn(seed)
        name = list(STARTS)[seed % len(STARTS)]
        found = differences(programs.running(program), STARTS[name])
        assert not found, f"seed {seed}, {name}, {program}: {found[0]}"


@pytest.mark.parametrize("name", gradients.SLOW)
def test_compiled(name):
    torch._dynamo.reset()
    assert not differences(gradients.SLOW[name], STARTS["head"])


def test_most_cases_give_an_answer():
    """A case of which real logits raise tests an error alone."""
    raises = [
        name
        for name, case in CASES.items()
        if outcome(case, given(STARTS["head"], False), False).raised
    ]  # fmt: skip
    assert len(CASES) > 1200
    assert len(raises) < 0.1 * len(CASES), raises


def test_most_programs_reach_their_end():
    ends = 0
    for seed in range(200):
        program = programs.running(programs.drawn(seed))
        seen = outcome(program, given(STARTS["head"], False), True)
        ends += not seen.raised and not seen.returned[1]
    assert ends > 100
