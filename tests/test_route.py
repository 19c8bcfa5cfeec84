"""The route of a call: a table of what decides it, and what `explain` says."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import neglog
from neglog import dispatch, kernels, route
from neglog.tiles import gemm

BEST = dispatch.best("cpu")


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def with_cuda(monkeypatch):
    """As on a machine whose CUDA kernels can run."""
    pretended = kernels.Build("cuda", True, "for the test")
    monkeypatch.setitem(dispatch._STATES, "cuda", pretended)
    route._for_tensor.cache_clear()
    yield
    monkeypatch.undo()
    route._for_tensor.cache_clear()


def logits(rows=6, vocab=5, **kind):
    return torch.zeros(rows, vocab, **kind)


# Each line: the tensor, the options of `choose`, the backend, and a word of the reason. The sizes
# show that none decides: one number, a batch, and what once was handed to torch and no longer is.
TABLE = {
    "float32": (logits(), {}, BEST, "compiled for"),
    "float64": (logits(dtype=torch.float64), {}, BEST, "compiled for"),
    "bfloat16": (logits(dtype=torch.bfloat16), {}, BEST, "compiled for"),
    "float16": (logits(dtype=torch.float16), {}, BEST, "compiled for"),
    "float8": (logits().to(torch.float8_e4m3fn), {}, "torch", "dtype torch.float8"),
    "one number": (logits(1, 1), {}, BEST, "compiled for"),
    "no rows": (logits(0, 5), {}, BEST, "compiled for"),
    "many": (logits(700, 300), {}, BEST, "compiled for"),
    "not contiguous": (logits().t(), {}, BEST, "compiled for"),
    "a parameter": (torch.nn.Parameter(logits()), {}, BEST, "compiled for"),
    "a subclass": (logits().as_subclass(Subclass), {}, "torch", "decides for itself"),
    "meta": (logits(device="meta"), {}, BEST, "compiled for"),
    "weight": (logits(), {"weight": torch.ones(5)}, BEST, "compiled for"),
    "weight that learns": (
        logits(), {"weight": torch.ones(5, requires_grad=True)}, "torch", "requires grad",
    ),
    "torch demanded": (logits(), {"backend": "torch"}, "torch", "demanded"),
    "numba demanded": (logits(), {"backend": "numba"}, "numba", "demanded"),
    "no kernel for the loss": (logits(), {"by_torch": "because"}, "torch", "because"),
}  # fmt: skip


# Scores that are given, and scores that are made in tiles.
@pytest.mark.parametrize(("x", "options", "backend", "why"), TABLE.values(), ids=TABLE.keys())
@pytest.mark.parametrize("workspace", [None, 1 << 20])
def test_table(x, options, backend, why, workspace):
    where = route.choose(x, workspace=workspace, **options)
    assert (where.backend, where.tiled) == (backend, workspace is not None and backend != "torch")
    assert why in where.why
    assert where.workspace == (workspace if where.tiled else 0)
    assert where.demanded == (options.get("backend") if backend == options.get("backend")
                              and backend != "torch" else "" or "")  # fmt: skip


@pytest.mark.parametrize("float32_is_faster", [False, True])
def test_the_dtype_of_tiles(monkeypatch, float32_is_faster):
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: float32_is_faster)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        half = dtype.itemsize == 2
        expected = torch.float32 if half and float32_is_faster else dtype
        assert route.choose(logits(dtype=dtype), workspace=1).tile_dtype == expected
        assert route.choose(logits(dtype=dtype)).tile_dtype == dtype


def test_devices(with_cuda):
    with FakeTensorMode():
        x = torch.zeros(6, 5, device="cuda")
        assert route.choose(x).backend == "cuda"
        with pytest.raises(RuntimeError, match="its kernels run on the CPU"):
            route.choose(x, backend="cython")
    with pytest.raises(RuntimeError, match="which its kernels do not run on"):
        route.choose(logits(), backend="cuda")


ON_CUDA = {
    "cross_entropy": (lambda x, key, t: neglog.cross_entropy(x, t), "nll"),
    "masked_cross_entropy": (lambda x, key, t: neglog.masked_cross_entropy(x, t, t > 5), "nll"),
    "linear_cross_entropy": (lambda x, key, t: neglog.linear_cross_entropy(x, x, t), "linear_nll"),
    "info_nce": (lambda x, key, t: neglog.info_nce(x, key, symmetric=True), "pairs"),
    "info_nce, queue": (lambda x, key, t: neglog.info_nce(x, key, key), "pairs"),
    "clip_loss": (lambda x, key, t: neglog.clip_loss(x, key, 10.0), "pairs"),
    "siglip_loss": (lambda x, key, t: neglog.siglip_loss(x, key, 10.0, 1.0), "pairs_sigmoid"),
    "nt_xent": (lambda x, key, t: neglog.nt_xent(x, key), "pairs"),
    "dcl": (lambda x, key, t: neglog.dcl(x, key), "pairs"),
}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "neglog":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", ON_CUDA)
def test_losses_choose_the_cuda_kernels(with_cuda, function):
    """Shapes alone, so that it can be asked where there is no GPU; no gradients for the same
    reason."""
    call, op = ON_CUDA[function]
    with FakeTensorMode():
        x, key = (torch.randn(2000, 1000, device="cuda") for _ in range(2))
        target = torch.randint(0, 1000, (2000,), device="cuda")
        with Seen() as seen:
            loss = call(x, key, target)
    assert seen.ops == [op]
    assert (loss.shape, loss.device.type) == ((), "cuda")


def test_a_backend_for_another_device_is_refused(with_cuda, monkeypatch):
    x, target = torch.randn(4, 5), torch.arange(4)
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot take this call: logits on device"
    ):
        neglog.cross_entropy(x, target, backend="cuda")
    with FakeTensorMode():
        on_gpu, labels = torch.randn(4, 5, device="cuda"), torch.zeros(4, device="cuda").long()
        with pytest.raises(RuntimeError, match=r"backend='cython'.*its kernels run on the CPU"):
            neglog.cross_entropy(on_gpu, labels, backend="cython")
    missing = kernels.Build("cuda", False, "not built: for the test")
    monkeypatch.setitem(dispatch._STATES, "cuda", missing)
    with pytest.raises(RuntimeError, match=r"(?s)not available here: 'cuda'.*not built: for the"):
        neglog.clip_loss(x, x, 1.0, backend="cuda")


def test_what_a_demanded_backend_cannot_take():
    with pytest.raises(RuntimeError, match="backend='cython' cannot take this call: logits of"):
        route.choose(logits().as_subclass(Subclass), backend="cython")
    with pytest.raises(RuntimeError, match="requires grad"):
        route.choose(logits(), weight=torch.ones(5, requires_grad=True), backend="cython")


def test_every_tensor_is_asked():
    assert route.choose(logits(), logits().as_subclass(Subclass)).backend == "torch"


def test_forward_mode():
    with torch.autograd.forward_ad.dual_level():
        assert route.choose(logits()).backend == "torch"
    assert route.choose(logits()).backend == BEST


TRACERS = {
    "torch.func": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, 6, 5)),
    "make_fx": lambda f, x: make_fx(f)(x),
    "symbolic make_fx": lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
    "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="eager")(x),
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS.keys())
def test_tracers_do_not_change_the_route(tracer, monkeypatch):
    found = []
    choose = route.choose

    def spy(*arguments, **options):
        where = choose(*arguments, **options)
        found.append((where.backend, where.demanded))
        return where

    monkeypatch.setattr(route, "choose", spy)
    torch._dynamo.reset()
    tracer(lambda x: neglog.cross_entropy(x, torch.arange(5).repeat(2)[:6]), logits())
    assert set(found) == {(BEST, "")}


def test_no_graph_depends_on_whether_similarities_are_kept():
    """With rows that are symbolic it is not known whether all fit in the workspace."""
    where = route.choose(logits(), workspace=1 << 20)
    assert route.keeps(where, 300, 300, True)
    assert not route.keeps(where, 300, 300, False)
    assert not route.keeps(where, 3000, 3000, True)

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return neglog.clip_loss(x, y, 10.0, options={"workspace_mb": 0.01})

    pair = (torch.randn(20, 4, requires_grad=True), torch.randn(20, 4))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Loss(), pair, dynamic_shapes=({0: rows}, {0: rows}))
    for count in (10, 400):  # both sides of the workspace
        given = (torch.randn(count, 4, requires_grad=True), torch.randn(count, 4))
        torch.testing.assert_close(exported.module()(*given), Loss()(*given))


# explain

UNIT = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
LABELS = torch.arange(6) % 3
CALLS = {
    "cross_entropy": (neglog.cross_entropy, (logits(), LABELS), False),
    "masked_cross_entropy": (neglog.masked_cross_entropy, (logits(), LABELS, LABELS > 0), False),
    "linear_cross_entropy": (neglog.linear_cross_entropy, (UNIT, UNIT, LABELS), True),
    "info_nce": (neglog.info_nce, (UNIT, UNIT), True),
    "clip_loss": (neglog.clip_loss, (UNIT, UNIT, 10.0), True),
    "siglip_loss": (neglog.siglip_loss, (UNIT, UNIT, 10.0, -1.0), True),
    "nt_xent": (neglog.nt_xent, (UNIT, UNIT), True),
    "dcl": (neglog.dcl, (UNIT, UNIT), True),
    "sup_con": (neglog.sup_con, (UNIT, LABELS), True),
}


@pytest.mark.parametrize(("function", "given", "tiled"), CALLS.values(), ids=CALLS.keys())
def test_explain_says_what_will_run(function, given, tiled):
    with dispatch.record() as ran:
        where = neglog.explain(function, *given)
        assert ran == []  # nothing was computed
        function(*given)
    assert (where.backend, where.tiled) == (BEST, tiled)
    assert ran[0].endswith(f":{where.backend}")
    assert str(where).startswith(f"{BEST}, in {'tiles' if tiled else 'memory'}")
    assert neglog.explain(function, *given, backend="torch").backend == "torch"


def test_explain_of_a_loss_without_a_kernel():
    where = neglog.explain(
        neglog.info_nce, UNIT, UNIT, UNIT.expand(6, 6, 4), negative_mode="paired"
    )
    assert where.backend == "torch"
    assert "own negatives" in where.why


def test_explain_of_modules_and_of_mistakes():
    module = neglog.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert neglog.explain(module, logits(), LABELS).backend == BEST
    with pytest.raises(TypeError, match="function: expected a loss of neglog, got <built-in"):
        neglog.explain(torch.add, 1, 2)
    with pytest.raises(TypeError, match="function: expected a loss or an instance of a module"):
        neglog.explain(neglog.nn.CrossEntropyLoss, logits(), LABELS)
    with pytest.raises(ValueError, match="reduction"):
        neglog.explain(neglog.cross_entropy, logits(), LABELS, reduction="average")
    with dispatch.record() as ran:  # a call after it is a call
        neglog.cross_entropy(logits(), LABELS)
    assert ran == [f"nll:{BEST}"]


@pytest.mark.parametrize("compiled_before", [False, True])
def test_explain_of_what_is_compiled(compiled_before):
    """It says what would run without torch.compile, whether there is a graph already or not."""
    torch.compiler.reset()
    module = neglog.nn.CrossEntropyLoss()
    module.compile(backend="eager")
    compiled = (
        torch.compile(neglog.cross_entropy, backend="eager"),
        torch.compile(neglog.nn.CrossEntropyLoss(), backend="eager"),
        module,
        partial(torch.compile(neglog.cross_entropy, backend="eager"), z_loss=0.1),
    )
    for function in compiled:
        if compiled_before:
            function(logits(), LABELS)
        with dispatch.record() as ran:
            assert neglog.explain(function, logits(), LABELS).backend == BEST
        assert ran == []


def test_explain_in_what_is_compiled():
    def traced(x):
        return x + len(neglog.explain(neglog.cross_entropy, x, LABELS).why)

    for whole in (False, True):
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match=r"neglog\.explain: expected a call outside"):
            torch.compile(traced, fullgraph=whole, backend="eager")(logits())
