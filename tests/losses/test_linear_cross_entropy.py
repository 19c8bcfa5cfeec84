"""neglog.linear_cross_entropy against torch's, and against cross_entropy of logits in memory."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.library import opcheck
from torch.testing._internal.common_methods_invocations import op_db

import neglog
from neglog import dispatch
from neglog.tiles import gemm, plan
from tests.support.backends import BACKENDS, KERNELS

OPINFO = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dispatch.use(request.param):
        yield request.param


def draw(rows=300, features=24, vocab=1000, dtype=torch.float64, seed=0):
    """Input, weight and bias that require grad; a target with a third of its rows ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head = (normal(rows, features), normal(vocab, features) / 3, normal(vocab))
    head = tuple(part.to(dtype).requires_grad_() for part in head)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[::3] = -100
    return *head, target


def in_memory(input, linear_weight, target, *, linear_bias=None, **options):
    return neglog.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def gradients(loss, inputs):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


@pytest.mark.parametrize("variant", OPINFO, ids=lambda op: op.variant_test_name or "plain")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opinfo_samples(backend, variant, dtype):
    tolerance = {torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2}}.get(dtype, {})
    count = 0
    for sample in variant.sample_inputs("cpu", dtype, requires_grad=True):
        weight, target = sample.args
        reference = {**sample.kwargs, "options": None}
        theirs = F.linear_cross_entropy(sample.input, weight, target, **reference)
        ours = neglog.linear_cross_entropy(sample.input, weight, target, **sample.kwargs)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
        inputs = (sample.input, weight)
        expected, actual = gradients(theirs, inputs), gradients(ours, inputs)
        if not theirs.isnan().any():
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
        count += 1
    assert count > 50


@pytest.mark.parametrize("variant", OPINFO[:1], ids=["plain"])
def test_opinfo_derivatives(backend, variant):
    for sample in list(variant.sample_inputs("cpu", torch.float64, requires_grad=True))[::4]:
        weight, target = sample.args

        def function(x, w, target=target, options=sample.kwargs):
            return neglog.linear_cross_entropy(x, w, target, **options)

        assert torch.autograd.gradcheck(function, (sample.input, weight))
        assert torch.autograd.gradgradcheck(function, (sample.input, weight))


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing, weight": {"label_smoothing": 0.1, "weight": True, "bias": True},
    "scale, cap, z": {"logit_scale": 0.7, "softcap": 5.0, "z_loss": 0.1},
    "num_items": {"num_items": 17},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("workspace", [0.1, 64])
def test_tiles_make_what_memory_makes(backend, options, reduction, workspace):
    if reduction == "none" and "num_items" in options:
        reduction = "mean"
    *head, target = draw()
    options = {**options, "reduction": reduction}
    if options.pop("bias", False):
        options["linear_bias"] = head[2]
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 2, 1000, dtype=torch.float64)
    inputs = head if "linear_bias" in options else head[:2]
    with dispatch.record() as ran:
        ours = neglog.linear_cross_entropy(
            *head[:2], target, options={"workspace_mb": workspace}, **options
        )
    assert ran[0] == ("nll:torch" if backend == "torch" else f"linear_nll:{backend}")
    theirs = in_memory(*head[:2], target, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_parts_have_no_gradient(backend, frozen, reduction):
    *head, target = draw()
    head[frozen] = head[frozen].detach()
    inputs = [part for part in head if part.requires_grad]
    results = [
        gradients(f(*head[:2], target, linear_bias=head[2], reduction=reduction), inputs)
        for f in (neglog.linear_cross_entropy, in_memory)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("backend", KERNELS)
def test_error_is_within_torchs(backend, dtype, reduction):
    x, w, b, target = draw(dtype=dtype, rows=600)
    if dtype == torch.float16:
        reduction = "none" if reduction == "sum" else reduction

    def error(function, **options):
        loss = function(x, w, target, linear_bias=b, reduction=reduction, **options)
        upstream = torch.full_like(loss, 256.0 if dtype == torch.float16 else 1.0)
        found = torch.autograd.grad(loss, (x, w, b), upstream)
        exact = [part.detach().double().requires_grad_() for part in (x, w, b)]
        true_loss = in_memory(*exact[:2], target, linear_bias=exact[2], reduction=reduction)
        truth = torch.autograd.grad(true_loss, exact, upstream.double())
        return [(f.double() - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]

    ours = error(neglog.linear_cross_entropy, backend=backend)
    theirs = error(getattr(F, "linear_cross_entropy", in_memory))  # new in torch 2.13
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.2 * other + 2e-7, (ours, theirs)


def test_statistics(backend):
    x, w, b, target = draw()
    stats = neglog.linear_cross_entropy(x, w, target, linear_bias=b, return_stats=True)
    expected = in_memory(x, w, target, linear_bias=b, return_stats=True)
    counted = target != -100
    torch.testing.assert_close(stats.loss, expected.loss)
    for ours, theirs in zip(stats[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[counted], theirs[counted])
        assert not ours[~counted].any()
    both = [
        gradients(s.loss + 0.1 * s.logsumexp[counted].square().sum(), (x, w, b))
        for s in (stats, expected)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shift_and_mask(backend, reduction):
    x, w, b, target = draw()
    x, target = x.view(3, 4, 25, -1), target.view(3, 4, 25)
    mask = torch.rand(25, generator=torch.Generator().manual_seed(1)) < 0.5
    ours = neglog.linear_cross_entropy(
        x, w, target, linear_bias=b, shift=True, mask=mask, reduction=reduction
    )
    labels = torch.where(mask, target, -100)[..., 1:]
    logits = F.linear(x[..., :-1, :], w, b)
    theirs = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction=reduction)
    theirs = theirs.view(3, 4, 24) if reduction == "none" else theirs
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_bytes_as_targets_and_a_mask_that_broadcasts(backend):
    x, w, b, _ = draw(vocab=200)
    x, target = x.view(12, 25, -1), torch.arange(300).remainder(200).view(12, 25)
    mask = (torch.arange(12) % 3 > 0)[:, None]
    ours, theirs = (
        neglog.linear_cross_entropy(x, w, t, linear_bias=b, shift=True, mask=m)
        for t, m in ((target.to(torch.uint8), mask), (target, mask.expand(12, 25)))
    )
    torch.testing.assert_close(ours, theirs)
    probabilities = F.one_hot(target, 200).to(x.dtype)
    same = neglog.linear_cross_entropy(x, w, probabilities, linear_bias=b, shift=True, mask=mask)
    torch.testing.assert_close(ours, same)


def test_shift_and_mask_of_probabilities(backend):
    x, w, _, _ = draw()
    x = x.view(12, 25, -1)
    target = torch.rand(12, 25, 1000, dtype=torch.float64)
    mask = torch.rand(12, 25) < 0.5
    ours = neglog.linear_cross_entropy(x, w, target, shift=True, mask=mask)
    kept = mask[:, 1:]
    logits = F.linear(x[:, :-1], w)[kept]
    torch.testing.assert_close(ours, F.cross_entropy(logits, target[:, 1:][kept]))


@pytest.mark.parametrize(("reduction", "value"), [("mean", torch.nan), ("sum", 0.0), ("none", 0.0)])
def test_all_ignored_rows_give_zero_gradients(backend, reduction, value):
    for dtype in (torch.float32, torch.float16):
        x, w, b, target = draw(dtype=dtype)
        target = torch.full_like(target, -100)
        loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)
        if backend != "torch":
            assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (x, w, b)))


def test_ignored_rows_may_be_nan(backend):
    x, w, b, target = draw()
    with torch.no_grad():
        x[::3] = torch.nan
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
    kept = target != -100
    expected = in_memory(x[kept], w, target[kept], linear_bias=b)
    torch.testing.assert_close(loss, expected)
    if backend != "torch":
        torch.testing.assert_close(gradients(loss, (x, w, b)), gradients(expected, (x, w, b)))


def test_second_derivative_and_retained_graph(backend):
    x, w, b, target = draw()
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(2 * loss, (x, w, b), retain_graph=True), tuple(2 * g for g in first)
    )

    def penalty(function):
        grads = torch.autograd.grad(
            function(x, w, target, linear_bias=b), (x, w), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w, b))

    torch.testing.assert_close(penalty(neglog.linear_cross_entropy), penalty(in_memory))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", KERNELS)
def test_derivatives(backend, reduction):
    *head, target = draw(6, 3, 5)

    def function(x, w, b):
        return neglog.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1, backend=backend
        )

    assert torch.autograd.gradcheck(function, head)
    assert torch.autograd.gradgradcheck(function, head)


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction):
    x, w, b, target = draw(6, 3, 5, dtype=torch.float32)
    options = (reduction, -100, 0.1, 1.0, 0.0, 0.0)
    wanted = [reduction != 0] * 3
    tiles = (1 << 20, torch.float32, 1e-3, "")
    arguments = (x, w, b, target, None, None, *options, True, wanted, *tiles)
    opcheck(torch.ops.neglog.linear_nll.default, arguments)
    loss, _, total, _, _, *formed = torch.ops.neglog.linear_nll.default(*arguments)
    arguments = (torch.ones_like(loss), None, x, w, b, target, None, total, *formed, *options,
                 [True] * 3, *tiles)  # fmt: skip
    arguments = tuple(
        a.detach().requires_grad_(a.is_floating_point() and a.requires_grad)
        if isinstance(a, torch.Tensor) else a for a in arguments
    )  # fmt: skip
    opcheck(
        torch.ops.neglog.linear_nll_backward.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", [None, *KERNELS])
def test_compiles_whole(dynamic, reduction, backend):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, w, b, t: neglog.linear_cross_entropy(
            x, w, t, linear_bias=b, reduction=reduction, backend=backend
        ),
        fullgraph=True, dynamic=dynamic,
    )  # fmt: skip
    for rows in (300, 299):
        x, w, b, target = draw(rows, dtype=torch.float32)
        ours = compiled(x, w, b, target)
        theirs = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_torch_func(backend):
    x, w, b, target = draw()

    def loss(function):
        return lambda x, w, b: function(x, w, target, linear_bias=b)

    ours = torch.func.grad(loss(neglog.linear_cross_entropy), (0, 1, 2))(x, w, b)
    theirs = torch.func.grad(loss(in_memory), (0, 1, 2))(x, w, b)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    x, w, b, target = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        ours = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
        theirs = F.cross_entropy(F.linear(x, w, b), target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    grads = gradients(ours, (x, w, b))
    assert all(g.dtype == torch.float32 for g in grads)
    for mine, other in zip(grads, gradients(theirs, (x, w, b)), strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_doubles_alone(backend, dtype):
    x, w, b, target = draw()
    with torch.autocast("cpu", dtype):
        ours = neglog.linear_cross_entropy(x, w, target, linear_bias=b)
        with pytest.raises(RuntimeError, match=r"linear_weight: expected dtype torch\.float64"):
            neglog.linear_cross_entropy(x, w.float(), target)
    torch.testing.assert_close(ours, in_memory(x, w, target, linear_bias=b))


@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_error_under_autocast_is_within_torchs(backend, dtype, upstream, monkeypatch):
    """What autocast rounds is float32, and so are its gradients, whatever multiplies them."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: False)
    x, w, b, target = draw(dtype=torch.float32, rows=600)
    exact = [part.detach().double().requires_grad_() for part in (x, w, b)]
    truth = torch.autograd.grad(
        upstream * in_memory(*exact[:2], target, linear_bias=exact[2]), exact
    )

    def error(function, **options):
        with torch.autocast("cpu", dtype):
            loss = function(x, w, target, linear_bias=b, **options)
        up = torch.tensor(upstream * (1024 if dtype == torch.float16 else 1))  # as a scaler has it
        found = torch.autograd.grad(loss, (x, w, b), up, retain_graph=True)
        again = torch.autograd.grad(loss, (x, w, b), up)
        assert all(torch.equal(*both) for both in zip(found, again, strict=True))
        found = [part.double() * upstream / up for part in found]
        return [(f - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)]

    ours = error(neglog.linear_cross_entropy, backend=backend)
    theirs = error(lambda x, w, t, linear_bias: F.cross_entropy(F.linear(x, w, linear_bias), t))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.02 * other, (ours, theirs)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_upstreams_are_not_rounded(backend, monkeypatch, wide):
    """A third in bfloat16 is off by 0.2%, and so would be every gradient."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    x, w, _, target = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = neglog.linear_cross_entropy(x, w, target, backend=backend)
    whole, third = (
        torch.autograd.grad(loss, (x, w), torch.tensor(up), retain_graph=True) for up in (1, 1 / 3)
    )
    for one, other in zip(whole, third, strict=True):
        assert abs(float((one.double() * other).sum() / one.double().square().sum()) - 1 / 3) < 1e-4


@pytest.mark.parametrize("way", ["blas", "onednn"])
@pytest.mark.parametrize(
    "bias", [torch.linspace(-3, 3, 2000)[::2], torch.tensor([2.0]).expand(1000)]
)
def test_a_bias_with_strides(backend, monkeypatch, way, bias):
    chosen = getattr(gemm, f"linear_by_{way}")
    monkeypatch.setattr(gemm, "fastest_linear", lambda: chosen)
    x, w, _, target = draw(dtype=torch.float32)
    ours, theirs = (
        neglog.linear_cross_entropy(x, w, target, linear_bias=b) for b in (bias, bias.clone())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wide", [False, True])
def test_float16_sums_beyond_its_range(monkeypatch, wide):
    """A class that each of 512 rows has, at 200: 102400 before the mean divides it."""
    monkeypatch.setattr(gemm, "float32_is_faster", lambda dtype: wide)
    x, w = torch.full((512, 8), 200.0).half(), torch.zeros(100, 8).half().requires_grad_()
    target = torch.zeros(512, dtype=torch.int64)
    loss = neglog.linear_cross_entropy(x, w, target, backend=KERNELS[0])
    (grad,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(grad[0], torch.full((8,), -198.0).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_few_masked_rows_may_be_nan(backend):
    x, w, _, target = draw(40, 6, 50)
    with torch.no_grad():
        x[::3] = torch.nan
    loss = neglog.linear_cross_entropy(x, w, target, backend=backend)
    kept = target != -100
    expected = in_memory(x[kept], w, target[kept])
    torch.testing.assert_close(gradients(loss, (x, w)), gradients(expected, (x, w)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_dimensions(backend, reduction):
    options = {"reduction": reduction}
    target = torch.tensor([0, 2])
    ours = neglog.linear_cross_entropy(torch.zeros(2, 0), torch.zeros(7, 0), target, **options)
    torch.testing.assert_close(ours, F.cross_entropy(torch.zeros(2, 7), target, **options))
    x, target = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    ours = neglog.linear_cross_entropy(x, torch.zeros(7, 4), target, shift=True, **options)
    expected = {"none": torch.zeros(2, 0), "mean": torch.tensor(torch.nan), "sum": torch.zeros(())}
    torch.testing.assert_close(ours, expected[reduction], equal_nan=True)


@pytest.mark.parametrize("mask", [False, True])
def test_probabilities_compile_whole(backend, mask):
    torch.compiler.reset()
    x, w, b, _ = draw(30, dtype=torch.float32)
    target = torch.rand(30, 1000)
    options = {"mask": torch.arange(30) % 3 > 0} if mask else {}

    def loss(x, w, b, t):
        return neglog.linear_cross_entropy(x, w, t, linear_bias=b, **options)

    ours = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(x, w, b, target)
    theirs = loss(x, w, b, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, (x, w, b)), gradients(theirs, (x, w, b)))


def test_a_tensor_of_scale_compiles(backend):
    x, w, _, target = draw(30, dtype=torch.float32)
    compiled = torch.compile(
        lambda x, w, t, s: neglog.linear_cross_entropy(x, w, t, logit_scale=s),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    scale = torch.tensor(0.5)
    expected = neglog.linear_cross_entropy(x, w, target, logit_scale=0.5)
    torch.testing.assert_close(compiled(x, w, target, scale), expected)


def test_export_of_any_number_of_rows(backend):
    class Head(torch.nn.Module):
        def forward(self, x, w, target):
            return neglog.linear_cross_entropy(x, w, target)

    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = {"x": {0: rows}, "w": None, "target": {0: rows}}
    x, w, _, target = draw(30, dtype=torch.float32)
    program = torch.export.export(Head(), (x, w, target), dynamic_shapes=shapes)
    x, _, _, target = draw(41, dtype=torch.float32)
    expected = neglog.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(program.module()(x, w, target), expected)


def test_vmap(backend):
    x, w, _, target = draw(60)
    x, target = x.view(3, 20, -1), target.view(3, 20)
    ours = torch.func.vmap(lambda x, t: neglog.linear_cross_entropy(x, w, t))(x, target)
    theirs = [neglog.linear_cross_entropy(x[i], w, target[i]) for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(theirs))

    def rows(x):
        return neglog.linear_cross_entropy(x, w, target[0], reduction="none")

    jacobian = torch.func.jacrev(rows)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(rows, x[0]))


def test_bits_repeat(backend):
    x, w, b, target = draw(dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss = neglog.linear_cross_entropy(
            x, w, target, linear_bias=b, options={"workspace_mb": 0.5}
        )
        runs.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_the_kernels_take_every_size():
    x, w, _, target = draw(dtype=torch.float32)
    for rows in (1, 10, 1000):
        with dispatch.record() as ran:
            neglog.linear_cross_entropy(x[:1].expand(rows, -1), w, target[:1].expand(rows))
        assert ran == ["linear_nll:cython"]


def test_module(backend):
    torch.manual_seed(0)
    module = neglog.nn.LinearCrossEntropyLoss(24, 1000, bias=True, label_smoothing=0.1, z_loss=0.1)
    x, _, _, target = draw(dtype=torch.float32)
    expected = neglog.linear_cross_entropy(
        x, module.linear.weight, target, linear_bias=module.linear.bias, label_smoothing=0.1,
        z_loss=0.1,
    )  # fmt: skip
    torch.testing.assert_close(module(x, target), expected)
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", neglog.nn._Head)(24, 1000, bias=True)
    theirs.load_state_dict(module.state_dict())
    wide = neglog.nn.LinearCrossEntropyLoss(24, 10, out_features=(2,))
    assert wide(x, torch.zeros(300, 2, dtype=torch.int64)).shape == ()


def test_module_for_a_torch_that_has_none(monkeypatch):
    """Before 2.13: the same arguments, state and numbers."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyLoss", raising=False)
    spec = importlib.util.spec_from_file_location("neglog_nn_alone", neglog.nn.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    weight = torch.linspace(0.5, 1.5, 10)
    options = {"out_features": (2,), "bias": True, "weight": weight, "label_smoothing": 0.1}
    old = alone.LinearCrossEntropyLoss(24, 10, **options, reduction="sum", softcap=5.0)
    new = neglog.nn.LinearCrossEntropyLoss(24, 10, **options, reduction="sum", softcap=5.0)
    new.load_state_dict(old.state_dict())
    x, target = torch.randn(30, 24), torch.arange(60).view(30, 2) % 10
    torch.testing.assert_close(old(x, target), new(x, target))
    assert "softcap=5.0" in repr(old)
    for wrong, match in (({"weight": weight[1:]}, "weight"), ({"label_smoothing": 2.0}, "0")):
        with pytest.raises(RuntimeError, match=match):
            alone.LinearCrossEntropyLoss(24, 10, **wrong)


def test_the_workspace_is_kept_to(monkeypatch):
    assert plan.workspace_bytes() == 64 << 20
    assert plan.workspace_bytes(1.5) == 3 << 19
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "8")
    assert plan.workspace_bytes() == 8 << 20
    assert plan.rows_per_tile(10_000, 1 << 17, 64 << 20) == 512
    assert plan.rows_per_tile(10_000, 1 << 30, 64 << 20) == plan.ROWS
    assert plan.rows_per_tile(7, 4, 64 << 20) == 7
    assert [s.stop - s.start for s in plan.row_tiles(10, 4)] == [4, 4, 2]
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "much")
    with pytest.raises(ValueError, match="NEGLOG_WORKSPACE_MB: expected a number above 0"):
        plan.workspace_bytes()


X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
BAD = {
    "in_features": (RuntimeError, r"linear_weight: expected in_features 4", (X, W[:, 1:], T), {}),
    "weight shape": (RuntimeError, r"linear_weight: expected shape", (X, W[0], T), {}),
    "bias": (RuntimeError, r"linear_bias: expected shape \[5\], got \[4\]", (X, W, T),
             {"linear_bias": torch.zeros(4)}),
    "dtype": (RuntimeError, r"linear_weight: expected dtype torch.float32", (X, W.double(), T), {}),
    "target": (ValueError, r"target: expected shape \[3\]", (X, W, T[:2]), {}),
    "target shape": (RuntimeError, r"target: expected shape \[3\]", (X, W, T[:, None]), {}),
    "integers": (NotImplementedError, r"input: expected a floating-point dtype, got torch.int64",
                 (T[:, None], T[:, None], T), {}),
    "shift": (TypeError, r"shift: expected a bool, got str", (X, W, T), {"shift": "no"}),
    "z_loss": (ValueError, r"z_loss: expected a finite number, got nan", (X, W, T),
               {"z_loss": torch.nan}),
    "num_items": (ValueError, r"num_items: expected a number from 0, got -1", (X, W, T),
                  {"num_items": -1}),
    "target dtype": (RuntimeError, r"target: expected dtype torch.int64", (X, W, T.int()), {}),
    "range": (IndexError, r"target 5 at row 0 is out of range", (X, W, T + 5), {}),
    "class weight": (RuntimeError, r"weight: expected shape \[5\]", (X, W, T),
                     {"weight": torch.ones(4)}),
    "mask dtype": (RuntimeError, r"mask: expected dtype torch.bool", (X, W, T), {"mask": T}),
    "mask shape": (RuntimeError, r"mask: expected shape \[3\]", (X, W, T), {"mask": T[:2] > 0}),
    "options": (TypeError, r"options: expected None", (X, W, T), {"options": {"chunk": 3}}),
    "workspace": (ValueError, r"workspace_mb: expected a number above 0", (X, W, T),
                  {"options": {"workspace_mb": 0}}),
    "filter": (ValueError, r"filter_eps: expected 'auto' or 0 <= number < 1, got -1", (X, W, T),
               {"options": {"filter_eps": -1}}),
    "smoothing": (RuntimeError, r"label_smoothing: expected", (X, W, T), {"label_smoothing": 2.0}),
    "reduction": (ValueError, r"reduction: expected", (X, W, T), {"reduction": "avg"}),
    "ignored probabilities": (RuntimeError, r"ignore_index: expected none",
                              (X, W, torch.zeros(3, 5)), {"ignore_index": 1}),
    "K-dim mask": (RuntimeError, r"mask: expected none", (X, W[:, None], T[:, None]),
                   {"mask": T[:, None] > 0}),
    "list": (TypeError, r"input: expected a Tensor, got list", ([1.0], W, T), {}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD.values(), ids=BAD.keys())
def test_bad_input(backend, error, message, arguments, options):
    with pytest.raises(error, match=message):
        neglog.linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_graph_that_is_walked_again(backend, dtype, reduction):
    """The first walk is given the memory of the gradients; it keeps what it was given."""
    x, w, b, target = draw(dtype=dtype)
    loss = neglog.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    held = [part.clone() for part in first]
    for factor in (1.0, 0.5, 1.0):  # by powers of two nothing is rounded
        again = torch.autograd.grad(factor * loss, (x, w, b), retain_graph=True)
        for part, before, kept in zip(again, first, held, strict=True):
            torch.testing.assert_close(part, factor * before)
            assert torch.equal(before, kept)
            assert part.data_ptr() != before.data_ptr()
    wanted = torch.autograd.grad(loss, (x, w, b), create_graph=True)
    torch.testing.assert_close(wanted, first)
    for _ in range(2):
        loss.backward(retain_graph=True)
    for leaf, part in zip((x, w, b), first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * part)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_not_copied():
    """What the forward formed is what the backward gives."""
    x, w, _, target = draw(2400, dtype=torch.float32)
    loss = neglog.linear_cross_entropy(x, w, target)
    formed = [part.data_ptr() for part in loss.grad_fn.formed[:2]]
    assert [grad.data_ptr() for grad in torch.autograd.grad(loss, (x, w))] == formed
    with torch.autocast("cpu", torch.bfloat16):  # whose float32 weights get theirs as it was formed
        loss = neglog.linear_cross_entropy(x, w, target)
    formed = [part.data_ptr() for part in loss.grad_fn.formed[:2]]
    assert [grad.data_ptr() for grad in torch.autograd.grad(loss, (x, w))] == formed


def test_hooks_of_saved_tensors_get_the_gradients_too():
    """Checkpointing drops what is saved, offloading moves it: nothing as large as the weight may be
    kept past them."""
    x, w, _, target = draw(2400, dtype=torch.float32)
    expected = torch.autograd.grad(neglog.linear_cross_entropy(x, w, target), (x, w))
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = neglog.linear_cross_entropy(x, w, target)
    assert packed.count(tuple(w.shape)) == 2  # the weight, and its gradient
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), expected)
    loss = torch.utils.checkpoint.checkpoint(
        neglog.linear_cross_entropy, x, w, target, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), expected)
