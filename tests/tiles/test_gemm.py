"""The products of a tile: each library gives the right numbers, and the faster is chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import neglog
from neglog.ops.linear_nll.tiles import Gradients, Head, Tiles
from neglog.tiles import gemm

SHORT = [torch.bfloat16, torch.float16]


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def error(found, truth):
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


# Both that torch offers, whichever is the faster here.
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_both_libraries(monkeypatch, library):
    for name in ("linear", "add_outer"):
        chosen = getattr(gemm, f"{name}_by_{library}")
        monkeypatch.setattr(gemm, f"fastest_{name}", lambda chosen=chosen: chosen)
    generator = torch.Generator().manual_seed(0)
    x, w, s = (
        torch.randn(n, m, generator=generator) for n, m in ((70, 33), (5000, 33), (70, 5000))
    )
    out = torch.empty(70, 5000)
    for bias in (None, torch.randn(5000, generator=generator)):
        gemm.linear(x, w, bias, out)
        torch.testing.assert_close(out, F.linear(x, w, bias), rtol=1e-5, atol=1e-5)
    total = torch.full((5000, 33), torch.nan)
    gemm.add_outer(s, x, total, True)
    gemm.add_outer(s, x, total, False)
    torch.testing.assert_close(total, 2 * s.t() @ x, rtol=1e-4, atol=1e-4)
    half, wide = s.bfloat16(), torch.zeros(5000, 33)
    gemm.add_outer(half, x.bfloat16(), wide, False)
    torch.testing.assert_close(wide, half.float().t() @ x.bfloat16().float(), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_a_wide_sum_is_asked_of_the_product_itself(first, monkeypatch):
    """As torch declares it: its device is CUDA, where tests/csrc/test_gpu.py has the numbers."""
    declared = torch.ops.aten.addmm.dtype_out._schema

    def called(*arguments, **named):
        names = [argument.name for argument in declared.arguments]
        return dict(zip(names, arguments, strict=False)) | named

    given = []
    monkeypatch.setattr(
        torch.ops.aten.addmm, "dtype_out", lambda *a, **n: given.append(called(*a, **n))
    )
    a, b, out = torch.empty(4, 4).bfloat16(), torch.empty(4, 4).bfloat16(), torch.empty(4, 4)
    gemm._accumulate(a, b, out, first)
    (found,) = given
    assert (found["self"] is out, found["mat1"] is a, found["mat2"] is b) == (True,) * 3
    assert found["out"] is out
    assert (found["out_dtype"], found["beta"]) == (torch.float32, not first)


def test_a_wrong_or_missing_product_is_not_chosen():
    out = torch.empty(2)

    def certain(to):
        to.fill_(1.0)

    def wrong(to):
        to.fill_(1.1)

    def missing(to):
        raise AttributeError("no such op")

    for other in (wrong, missing):
        assert gemm._faster((certain, other), (out,), out) is certain
    assert gemm.fastest_linear() in (gemm.linear_by_blas, gemm.linear_by_onednn)


def test_the_choice_can_be_fixed(monkeypatch):
    def by_onednn():
        raise AssertionError("asked for the faster product")

    monkeypatch.setattr(gemm, "fastest_linear", by_onednn)
    monkeypatch.setattr(gemm, "SMALL_PRODUCT", 3 * 4 * 5)
    x, w = draw((3, 4), (5, 4))
    out = torch.empty(3, 5)
    torch.use_deterministic_algorithms(True)
    try:
        gemm.linear(x, w, None, out)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("NEGLOG_MATMUL", "blas")
    gemm.linear(x, w, None, out)
    torch.testing.assert_close(out, x @ w.t())
    monkeypatch.delenv("NEGLOG_MATMUL")
    with pytest.raises(AssertionError, match="the faster product"):
        gemm.linear(x, w, None, out)
    gemm.linear(x[:2], w, None, out[:2])  # too small to ask


def test_an_unknown_product_is_refused(monkeypatch):
    monkeypatch.setattr(gemm, "SMALL_PRODUCT", 0)
    monkeypatch.setenv("NEGLOG_MATMUL", "onednn")
    x, w = draw((3, 4), (5, 4))
    with pytest.raises(ValueError, match="NEGLOG_MATMUL: expected blas, got 'onednn'"):
        gemm.linear(x, w, None, torch.empty(3, 5))


# Several parts of a product, one number, and rests of every loop.
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("shape", [(70, 33, 5000), (1, 1, 1), (3, 7, 31)])
def test_widened_products_round_once(monkeypatch, dtype, shape):
    monkeypatch.setattr(gemm, "WIDENED_BYTES", 1)  # parts of the least height
    rows, features, vocab = shape
    x, w, bias = draw((rows, features), (vocab, features), (vocab,), dtype=dtype)
    s, sum_x, sum_w = draw((rows, vocab), (rows, features), (vocab, features))
    exact = [part.double() for part in (x, w, bias, s)]
    out = torch.full((rows, vocab), torch.nan)
    for given, added in ((None, 0), (bias, exact[2])):
        gemm.linear(x, w, given, out)
        assert error(out, exact[0] @ exact[1].t() + added) < 1e-6
    short = torch.full((rows, features), torch.nan, dtype=dtype)
    gemm.product(s, w, short)
    truth = exact[3] @ exact[1]
    assert error(short, truth) <= error(truth.to(dtype), truth) + 1e-6
    for first in (True, False):
        total, before = sum_x.clone(), 0 if first else sum_x.double()
        gemm.add_product(s, w, total, first)
        assert error(total, truth + before) < 1e-6
        total, before = sum_w.clone(), 0 if first else sum_w.double()
        gemm.add_outer(s, x, total, first)
        assert error(total, exact[3].t() @ exact[0] + before) < 1e-6


def clip(image, text, scale, **options):
    return neglog.clip_loss(image, text, scale, **options)


def clip_in_memory(image, text, scale):
    z, target = scale * image @ text.t(), torch.arange(len(image))
    return (F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)) / 2


def siglip(image, text, scale, **options):
    return neglog.siglip_loss(image, text, scale, -1.0, **options)


def siglip_in_memory(image, text, scale):
    z = scale * image @ text.t() - 1.0
    return -F.logsigmoid((2 * torch.eye(len(z), dtype=z.dtype) - 1) * z).sum() / len(z)


def linear(x, w, bias, **options):
    target = torch.arange(len(x)).where(torch.arange(len(x)) % 3 > 0, -100)
    return neglog.linear_cross_entropy(x, w, target, linear_bias=bias, **options)


def linear_in_memory(x, w, bias):
    target = torch.arange(len(x)).where(torch.arange(len(x)) % 3 > 0, -100)
    return F.cross_entropy(F.linear(x, w, bias), target)


LOSSES = {
    "linear": (linear, linear_in_memory, ((150, 24), (500, 24), (500,))),
    "clip": (clip, clip_in_memory, ((150, 24), (150, 24), ())),
    "siglip": (siglip, siglip_in_memory, ((150, 24), (150, 24), ())),
}


# A tile of the operands' dtype and of float32, kept and made again; each loss adds up otherwise.
@pytest.mark.parametrize("workspace", [64, 0.05])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_either_tile(monkeypatch, name, dtype, wide, workspace):
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    tiles, multiply = set(), gemm.linear
    monkeypatch.setattr(
        gemm, "linear", lambda x, w, b, out: tiles.add(out.dtype) or multiply(x, w, b, out)
    )
    ours, theirs, shapes = LOSSES[name]
    inputs = [x.requires_grad_() for x in draw(*shapes, dtype=dtype)]
    if name != "linear":
        inputs[2] = torch.tensor(0.5, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = theirs(*exact)
    truth = (truth, *torch.autograd.grad(truth, exact))

    def errors(loss):
        found = (loss, *torch.autograd.grad(loss, inputs))
        return [error(one, other) for one, other in zip(found, truth, strict=True)]

    mine = errors(ours(*inputs, options={"workspace_mb": workspace}))
    assert tiles == {torch.float32 if wide else dtype}
    for one, other, exact in zip(mine, errors(theirs(*inputs)), truth, strict=True):
        lucky = torch.finfo(dtype).eps if exact.dim() == 0 else 0  # one number may err by chance
        assert one <= 1.2 * other + 1e-6 + lucky


# Whichever is the faster, in both dtypes that have a choice.
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_the_faster_tile_is_chosen(monkeypatch, dtype, wide):
    def times(candidates, rounds):
        return {one: float(index != wide) for index, one in enumerate(candidates)}

    monkeypatch.setattr(gemm, "_times", times)
    gemm._measured.cache_clear()
    try:
        x = torch.zeros(100, 4, dtype=dtype)
        assert gemm.tile_dtype(x) == (torch.float32 if wide else dtype)
    finally:
        gemm._measured.cache_clear()
    assert gemm.tile_dtype(x.double()) == torch.float64
    assert gemm.tile_dtype(x.to("meta")) == dtype


@pytest.mark.parametrize(
    ("rows", "dtype", "wide", "learns", "single"),
    [
        (300, torch.bfloat16, False, True, True),  # 0.6 MB of logits: the sum would have 0.128
        (300, torch.bfloat16, False, False, False),
        (400, torch.bfloat16, False, True, False),
        (300, torch.bfloat16, True, True, False),
        (300, torch.float16, False, True, False),  # divided in the backward, from a wide sum
        (100, torch.float32, False, True, True),
    ],
)
def test_one_tile_has_the_memory_it_saves(monkeypatch, rows, dtype, wide, learns, single):
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    x, w = draw((rows, 32), (1000, 32), dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    dtype = torch.float32 if wide else dtype
    tiles = Tiles(Head(x, w, None), target, None, -100, 500_000, dtype, learns)
    gradients = Gradients(tiles, [True, learns, False], 0.0)
    assert tiles.single == single
    assert len(list(tiles)) == (1 if single else -(-rows // tiles.height))
    if learns:
        assert gradients.weight.dtype == (dtype if single else torch.float32)


def test_the_choice_can_be_made_while_torch_traces():
    gemm._measured.cache_clear()
    with FakeTensorMode():
        chosen = gemm.tile_dtype(torch.empty(3, 4, dtype=torch.bfloat16))
    assert chosen in (torch.float32, torch.bfloat16)
    assert chosen == gemm.tile_dtype(torch.empty(3, 4, dtype=torch.bfloat16))


# A tile of the operands' dtype, and of float32.
@pytest.mark.parametrize("wide", [False, True])
def test_either_tile_compiles_whole(monkeypatch, wide):
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    torch.compiler.reset()
    image, text = (x.requires_grad_() for x in draw((600, 8), (600, 8), dtype=torch.bfloat16))
    scale = torch.tensor(0.5, requires_grad=True)
    inputs = (image, text, scale)
    compiled = torch.compile(neglog.clip_loss, fullgraph=True, backend="aot_eager")
    results = []
    for loss in (compiled(*inputs), neglog.clip_loss(*inputs)):
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results)


# What torch.compile meets first may be the measurement, which it cannot trace.
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_compiles_whole_before_anything_was_measured(name):
    torch.compiler.reset()
    gemm._measured.cache_clear()
    loss, _, shapes = LOSSES[name]
    inputs = draw(*shapes, dtype=torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
