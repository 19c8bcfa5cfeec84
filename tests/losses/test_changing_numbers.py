"""Numbers of Python that change each step, under torch.compile, and numbers in traced tensors.

torch.compile makes a symbol of a number that it has seen change. A float of an op is a constant of
the graph, so a symbol must reach an op in a tensor.
"""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import Unsupported
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import neglog
from tests.support.traced_calls import HEAD, TARGET, WEIGHT, X, Y, assert_same, outcome

STEPS = [0.1 + 0.01 * step for step in range(12)]


def all_of_rows(v):
    return {
        "z_loss": v, "softcap": 3 + v, "logit_scale": 2 * v, "label_smoothing": v / 2,
        "num_items": 9 * v,
    }  # fmt: skip


CALLS = {
    "cross_entropy": lambda x, v: neglog.cross_entropy(x, TARGET, WEIGHT, **all_of_rows(v)),
    "cross_entropy, probabilities": (
        lambda x, v: neglog.cross_entropy(x, Y.softmax(1), z_loss=v, reduction="none")
    ),
    "cross_entropy, by torch": (
        lambda x, v: neglog.cross_entropy(x, TARGET, backend="torch", **all_of_rows(v))
    ),
    "masked_cross_entropy": (
        lambda x, v: neglog.masked_cross_entropy(x, TARGET, TARGET >= 0, **all_of_rows(v))
    ),
    "linear_cross_entropy": (
        lambda x, v: neglog.linear_cross_entropy(x, HEAD, TARGET, **all_of_rows(v))
    ),
    "info_nce, by rows": (
        lambda x, v: neglog.info_nce(
            x, Y, temperature=v, label_smoothing=v, options={"workspace_mb": 1e-3}
        )
    ),
    "info_nce, symmetric": (
        lambda x, v: neglog.info_nce(x, Y, temperature=v, label_smoothing=v, symmetric=True)
    ),
    "info_nce, queue": (
        lambda x, v: neglog.info_nce(x, Y, HEAD, temperature=v, hard_negative_weight=v)
    ),
    "clip_loss": lambda x, v: neglog.clip_loss(x, Y, v),
    "siglip_loss": lambda x, v: neglog.siglip_loss(x, Y, v, -v),
    "nt_xent": lambda x, v: neglog.nt_xent(x, Y, v),
    "dcl": lambda x, v: neglog.dcl(x, Y, v),
    "sup_con": lambda x, v: neglog.sup_con(x, TARGET, v),
}


def compiles_once_more(function, steps, run=None, **options):
    """One graph for the first number, and one for the symbol, with eager numbers.

    AOT takes symbols out of graphs, as inductor has it: what cannot be taken out becomes a constant
    again.
    """
    torch.compiler.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=compiler, **options)
    run = run or (lambda f, step: outcome(f, (X, step)))
    for step in steps:
        assert_same(run(compiled, step), run(function, step))
    assert len(graphs) <= 2


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS.keys())
def test_a_number_that_changes(function):
    compiles_once_more(function, STEPS)


def test_a_count_that_changes():
    compiles_once_more(lambda x, v: neglog.cross_entropy(x, TARGET, num_items=v), range(5, 17))


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_an_ignore_index_that_changes(name, by_torch):
    head = (HEAD,) if name == "linear_cross_entropy" else ()
    given = {"backend": "torch"} if by_torch else {}
    target = TARGET.clamp(min=0)

    def loss(x, v):
        return getattr(neglog, name)(x, *head, target, ignore_index=v, **given)

    compiles_once_more(loss, range(-5, 7))


def test_a_module_whose_number_changes():
    """Its attributes, all of which dynamic=True makes symbols of from the first."""
    module = neglog.nn.CrossEntropyLoss(label_smoothing=0.25, softcap=7.0)

    def run(function, step):
        module.z_loss = step
        return outcome(function, (X, TARGET))

    compiles_once_more(module, STEPS, run, dynamic=True)


def test_a_wrong_number_after_right_ones():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, v: neglog.cross_entropy(x, TARGET, z_loss=v), backend="eager"
    )
    for right in STEPS[:3]:
        compiled(X, right)
    with pytest.raises(ValueError, match="z_loss: expected a number from 0, got -1"):
        compiled(X, -1.0)


# The whole function is one graph, so torch raises its own error, which has ours in it.
@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("softcap", -1.0, "ValueError"), ("z_loss", -1.0, "ValueError"),
        ("num_items", -1.0, "ValueError"), ("logit_scale", 1e300, "ValueError"),
        ("label_smoothing", -1.0, "RuntimeError"), ("temperature", -1.0, "ValueError"),
        ("logit_bias", 1e400, "ValueError"),
    ],
)  # fmt: skip
def test_a_wrong_number_in_a_whole_graph_after_right_ones(name, wrong, error):
    torch.compiler.reset()

    def loss(x, v):
        if name == "temperature":
            return neglog.info_nce(x, Y, temperature=v)
        if name == "logit_bias":
            return neglog.siglip_loss(x, Y, 1.0, v)
        return neglog.cross_entropy(x, TARGET, **{name: v})

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for right in STEPS[:3]:
        compiled(X, right)
    with pytest.raises(Unsupported, match=rf"{error}\(.*{name}: expected"):
        compiled(X, wrong)


# In a tensor that is traced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_no_graph_has_the_number_of_a_tensor():
    def loss(x, t, z_loss, softcap):
        return neglog.cross_entropy(x, t, z_loss=z_loss, softcap=softcap)

    first, later = ([X, TARGET, torch.tensor(v), torch.tensor(3 * v)] for v in (1.0, 2.0))
    for run in (
        make_fx(loss)(*first),
        make_fx(loss, tracing_mode="symbolic")(*first),
        torch.jit.trace(loss, first),
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
    ):
        assert_same(*(outcome(f, later) for f in (run, loss)))
    mapped = torch.vmap(loss)(*map(torch.stack, zip(first, later, strict=True)))
    torch.testing.assert_close(mapped, torch.stack([loss(*first), loss(*later)]))
    with FakeTensorMode() as mode:
        assert outcome(loss, [mode.from_tensor(x) for x in first]).gradient.shape == X.shape
