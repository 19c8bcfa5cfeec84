"""torch.export and torch.compile with dynamic rows: no traced Python compares a size, so that one
graph serves all."""

import pytest
import torch
from torch.export import Dim

import neglog
from tests.support.processes import python
from tests.support.traced_calls import (
    CALLS,
    HEAD,
    LABELS,
    PAIR_CALLS,
    ROW_CALLS,
    ROWS,
    X,
    assert_same,
    has_rows,
    of_rows,
    outcome,
)

# The fewest rows that may be dynamic. 600: not all similarities fit in the workspace. 15,000: more
# logits than the gradient is formed of in the forward, and than one thread takes.
FEWEST, MANY_PAIRS, MANY_ROWS = 2, 600, 15_000
DIMENSIONS = {
    "bounded": lambda: Dim("rows", min=2, max=20_000),
    "unbounded": lambda: Dim("rows", min=2),
    "auto": lambda: Dim.AUTO,
    "dynamic": lambda: Dim.DYNAMIC,
}
# One form of each loss.
PLAIN = [name for name in CALLS if "," not in name]


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def exported(function, given, dimension, strict=False):
    rows = dimension()
    shapes = (tuple({0: rows} if has_rows(x) else None for x in given),)
    return torch.export.export(
        Module(function), tuple(given), dynamic_shapes=shapes, strict=strict
    ).module()


def sizes_of(name):
    return (FEWEST, MANY_PAIRS if name in PAIR_CALLS else MANY_ROWS)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [(name, kind) for kind in DIMENSIONS for name in (CALLS if kind == "bounded" else PLAIN)],
)
def test_rows_are_dynamic(name, dimension):
    function, given = CALLS[name]
    program = exported(function, given, DIMENSIONS[dimension])
    for count in sizes_of(name):
        assert_same(*(outcome(f, of_rows(given, count)) for f in (program, function)))


# Dynamo has its own view of what a comparison with a size is.
@pytest.mark.parametrize("name", PLAIN)
def test_by_dynamo(name):
    function, given = CALLS[name]
    program = exported(function, given, DIMENSIONS["bounded"], strict=True)
    for count in sizes_of(name):
        assert_same(*(outcome(f, of_rows(given, count)) for f in (program, function)))


def test_positions_of_sequences_are_dynamic():
    """With shift, both sizes of (batch, positions)."""

    def function(x, t):
        return neglog.linear_cross_entropy(x, HEAD, t, shift=True)

    given = X.view(4, 10, -1), LABELS.view(4, 10)
    shapes = ({0: Dim("batch"), 1: Dim("positions", min=2)},) * 2
    program = torch.export.export(Module(function), given, dynamic_shapes=(shapes,)).module()
    for shape in ((2, 20), (20, 2), (1, 40)):
        x, t = (each.reshape(*shape, *each.shape[2:]) for each in given)
        torch.testing.assert_close(program(x, t), function(x, t))


# Where a dimension is marked, another number of rows that compiles anew is an error. The bounds are
# what a comparison would violate.
BOUNDED = {"min": 2, "max": 20_000}


@pytest.mark.parametrize(
    ("name", "marks"), [*((name, BOUNDED) for name in PLAIN), ("cross_entropy", {})]
)
def test_marked_rows_compile_once(name, marks):
    torch.compiler.reset()
    function, given = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    marked = [x.clone() for x in given]
    for x in marked:
        if has_rows(x):
            torch._dynamo.mark_dynamic(x, 0, **marks)
    assert_same([compiled(*marked)], [function(*given)])
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in sizes_of(name):
            rows = of_rows(given, count)
            assert_same([compiled(*rows)], [function(*rows)])


# tests/losses/test_contrastive_transforms.py has the losses of embeddings.
@pytest.mark.parametrize("name", [name for name in PLAIN if name in ROW_CALLS])
def test_compiled_dynamic_gradients(name):
    torch.compiler.reset()
    function, given = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (ROWS, *sizes_of(name)):
        assert_same(*(outcome(f, of_rows(given, count)) for f in (compiled, function)))


LOAD = """
import sys, torch, neglog
exported, traced, given = sys.argv[1:]
logits, target = torch.load(given)
try:
    torch.export.load(exported)
except Exception:
    print("unknown")
import neglog.nn
for loss in (torch.export.load(exported).module(), torch.jit.load(traced)):
    print(loss(logits, target).item())
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_saved_program_in_a_new_process(tmp_path):
    """neglog.nn registers the ops; neglog alone does not import torch."""
    paths = [str(tmp_path / name) for name in ("exported.pt2", "traced.pt", "given.pt")]
    given, loss = (torch.randn(6, 5), torch.arange(6) % 5), neglog.nn.CrossEntropyLoss()
    torch.export.save(torch.export.export(loss, given), paths[0])
    torch.jit.save(torch.jit.trace(loss, given), paths[1])
    torch.save(given, paths[2])
    done = python(LOAD, *paths)
    assert done.stdout.split() == ["unknown", *[str(loss(*given).item())] * 2], done.stderr
