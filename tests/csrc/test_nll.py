"""The CUDA kernels and the schedules over them: on a GPU and, emulated, on the CPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import neglog
from neglog import dispatch, kernels, reference, torch_state
from neglog.ops.linear_nll import schedule as linear_schedule
from neglog.ops.linear_nll import schema as linear_schema
from neglog.ops.linear_nll.cuda import CudaRows
from neglog.ops.pairs import formula, schedule, schema
from neglog.ops.pairs.cpu import CpuTiles
from neglog.ops.pairs.cuda import CudaTiles
from neglog.ops.pairs.schema import Pairs
from tests.support.cuda_devices import GRADIENT, LOSS, normal, off, real_of

NONE, MEAN, SUM = 0, 1, 2
INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (2, 7), (7, 31), (5, 257), (3, 2049), (2, 9001)]
# label_smoothing, logit_scale, softcap, z_loss
OPTIONS = {
    "plain": (0.0, 1.0, 0.0, 0.0),
    "smoothing": (0.1, 1.0, 0.0, 0.0),
    "all": (0.2, 0.7, 5.0, 0.1),
}


# The functions, on tensors that say they lie on a GPU

CALLS = {
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


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device, as a graph that is captured does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "neglog":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", CALLS)
def test_functions_choose_the_cuda_kernels(function, monkeypatch):
    """Shapes alone, so that it can be asked where there is no GPU; no gradients for the same
    reason."""
    call, op = CALLS[function]
    pretended = kernels.Build("cuda", True, "for the test")
    monkeypatch.setitem(dispatch._STATES, "cuda", pretended)
    with FakeTensorMode():
        x, key = (torch.randn(2000, 1000, device="cuda") for _ in range(2))
        target = torch.randint(0, 1000, (2000,), device="cuda")
        with Seen() as seen:
            loss = call(x, key, target)
    assert seen.ops == [op]
    assert (loss.shape, loss.device.type) == ((), "cuda")


def test_a_backend_for_another_device_is_refused(monkeypatch):
    pretended = kernels.Build("cuda", True, "for the test")
    monkeypatch.setitem(dispatch._STATES, "cuda", pretended)
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


# nll


def problem(shape, dtype, probabilities, device, seed=0):
    """Logits at a row stride that no vector divides, a target, a class weight."""
    rows, vocab = shape
    logits = (normal(rows, vocab + 3, seed=seed) * 3).to(dtype)
    weight = (normal(vocab, seed=seed + 1).abs() + 0.5).to(real_of(dtype))
    if probabilities:
        target = normal(rows, vocab, seed=seed + 2).softmax(1).to(dtype)
    else:
        target = normal(rows, seed=seed + 2).abs().mul(1e6).long() % vocab
        target[1::5] = -100
    return logits.to(device)[:, 2:-1], target.to(device), weight.to(device)


def truth(logits, target, weight, options, **more):
    smoothing, scale, softcap, z_loss = options
    target = target.cpu()
    return reference.nll(
        logits.double().cpu().numpy(),
        target.double().numpy() if target.dim() == 2 else target.numpy(),
        weight=None if weight is None else weight.double().cpu().numpy(),
        label_smoothing=smoothing, logit_scale=scale, softcap=softcap or None, z_loss=z_loss,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nll_against_the_oracle(device, dtype, shape, options, probabilities):
    logits, target, weight = problem(shape, dtype, probabilities, device.name)
    values = (MEAN, -100, *options)
    expected = truth(logits, target, weight, options)
    loss, lse, low, total, correct, entropy = device.ops.nll(
        logits, target, weight, None, *values, True, ""
    )
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(lse.double() + low.double(), expected.lse) <= LOSS[dtype]
    assert off(entropy, expected.entropy) <= 10 * LOSS[dtype]
    assert correct.tolist() == expected.correct.tolist()
    upstream = torch.ones((), dtype=loss.dtype, device=device.name)
    gradient = device.ops.nll_backward(
        upstream, None, logits, target, weight, lse, low, total, *values, ""
    )
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_nll_in_place_and_its_upstream(device, dtype, options, reduction):
    """Nothing is written beside the logits, in front of them, behind or between."""
    given, target, weight = problem((7, 2049), dtype, False, device.name)
    memory = torch.full((9, 2060), 7.0, dtype=dtype, device=device.name)
    logits = memory[1:-1, 5:-6]
    logits.copy_(given)
    name = ("none", "mean", "sum")[reduction]
    expected = truth(given, target, weight, options, reduction=name)
    loss, lse, total, _, _ = device.ops.nll_(
        logits, target, weight, None, reduction, -100, *options, False, ""
    )
    late = dtype == torch.float16 and reduction == MEAN  # divided in the backward
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(logits / total if late else logits, expected.grad) <= GRADIENT[dtype]
    before = logits.clone()
    device.ops.nll_scale_(logits, torch.tensor(1.0, dtype=lse.dtype, device=device.name))
    assert torch.equal(logits, before)
    factor = torch.linspace(-1, 2, 7, dtype=lse.dtype, device=device.name)
    device.ops.nll_scale_(logits, factor)
    assert torch.equal(logits, (before * factor[:, None]).to(dtype))
    logits.fill_(7.0)
    assert bool((memory == 7.0).all())


# Bytes of a row that is held by one block, and by clusters of two, four and eight.
ON_CHIP = {"one": 33 << 10, "two": 100 << 10, "four": 250 << 10, "eight": 513 << 10}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_bytes", ON_CHIP.values(), ids=ON_CHIP.keys())
def test_nll_in_place_on_chip(device, dtype, row_bytes, reverse, aligned, monkeypatch):
    """Rows that stay in shared memory, at every alignment; softcap and z_loss, ignored rows, rows
    of -inf; nothing beside them is written."""
    if reverse:
        monkeypatch.setenv("NEGLOG_REVERSED", "1")
    vocab = row_bytes // dtype.itemsize + 5
    given, target, weight = problem((4, vocab), dtype, False, device.name)
    given[2, ::2] = -INF
    target[:] = torch.tensor([vocab - 1, -100, 1, vocab // 2])
    memory = torch.full((4, vocab + 40), 7.0, dtype=dtype, device=device.name)
    start = 16 // dtype.itemsize if aligned else 3
    logits = memory[:, start : start + vocab]
    logits.copy_(given)
    options = (0.0, *OPTIONS["all"][1:])
    expected = truth(given, target, weight, options, reduction="sum")
    loss, lse, *_ = device.ops.nll_(logits, target, weight, None, SUM, -100, *options, False, "")
    assert off(loss, expected.loss) <= 10 * LOSS[dtype]
    assert off(lse[[0, 2, 3]], expected.lse[[0, 2, 3]]) <= LOSS[dtype]
    assert off(logits, expected.grad) <= GRADIENT[dtype]
    assert not logits[1].any()
    logits.fill_(7.0)
    assert bool((memory == 7.0).all())


def test_nll_of_columns_that_are_not_adjacent(device):
    given, target, weight = problem((5, 257), torch.float32, False, device.name)
    logits = given.t().contiguous().t()
    options = OPTIONS["all"]
    expected = truth(given, target, weight, options)
    device.ops.nll_(logits, target, weight, None, MEAN, -100, *options, False, "")
    assert off(logits, expected.grad) <= GRADIENT[torch.float32]
    device.ops.nll_scale_(logits, torch.tensor(2.0, device=device.name))
    assert off(logits, 2 * expected.grad) <= GRADIENT[torch.float32]


@pytest.mark.parametrize("probabilities", [False, True])
def test_nll_with_an_upstream_for_each_row_and_its_lse(device, dtype, probabilities):
    logits, target, weight = problem((7, 257), dtype, probabilities, device.name)
    options = OPTIONS["all"]
    _, lse, low, total, _, _ = device.ops.nll(
        logits, target, weight, None, NONE, -100, *options, True, ""
    )
    grad_loss, grad_lse = normal(2, 7).to(lse.dtype).to(device.name)
    expected = truth(
        logits, target, weight, options, reduction="none",
        grad_loss=grad_loss.double().cpu().numpy(), grad_lse=grad_lse.double().cpu().numpy(),
    )  # fmt: skip
    gradient = device.ops.nll_backward(
        grad_loss, grad_lse, logits, target, weight, lse, low, total, NONE, -100, *options, ""
    )
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


@pytest.mark.parametrize("vocab", [5, 300])
def test_nll_of_extremes(device, dtype, vocab):
    rows = [[-INF], [INF], [NAN], [1e4], [-1e4], [1e4, -1e4], [-INF, 0.0], [INF, -INF], [NAN, INF]]
    logits = torch.zeros(len(rows), vocab, dtype=torch.float64)
    for row, start in zip(logits, rows, strict=True):
        row[: len(start)] = torch.tensor(start)
    logits = torch.cat([logits, torch.full((1, vocab), -INF)]).to(dtype).to(device.name)
    target = torch.full((len(logits),), vocab - 1, device=device.name)
    options = OPTIONS["plain"]
    expected = truth(logits, target, None, options, reduction="none")
    loss, lse, low, total, _, _ = device.ops.nll(
        logits, target, None, None, NONE, -100, *options, False, ""
    )
    assert off(loss, expected.loss) <= LOSS[dtype]
    upstream = torch.ones(len(logits), dtype=lse.dtype, device=device.name)
    gradient = device.ops.nll_backward(
        upstream, None, logits, target, None, lse, low, total, NONE, -100, *options, ""
    )
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


def test_nll_of_nothing(device):
    for rows, vocab in ((0, 5), (3, 0)):
        logits = torch.empty(rows, vocab, device=device.name)
        target = torch.full((rows,), -100, device=device.name)
        loss = device.ops.nll(logits, target, None, None, MEAN, -100, *OPTIONS["plain"], False, "")[
            0
        ]
        assert loss.isnan()


@pytest.mark.parametrize("probabilities", [False, True])
def test_nll_of_no_classes(device, probabilities):
    """Rows without columns, whose memory has no address: nothing is read, nothing written."""
    logits = torch.empty(4, 0, device=device.name)
    target = torch.empty(4, 0) if probabilities else torch.full((4,), -100)
    target, options = target.to(device.name), OPTIONS["plain"]
    for reduction in (NONE, MEAN, SUM):
        given = (logits, target, None, None, reduction, -100, *options)
        loss, lse, low, total, _, _ = device.ops.nll(*given, True, "")
        again, *_ = device.ops.nll_(*given, False, "")
        torch.testing.assert_close(again, loss, equal_nan=True)
        grad = device.ops.nll_backward(
            torch.ones_like(loss), None, logits, target, None, lse, low, total, *given[4:], ""
        )
        assert grad.shape == (4, 0)


def test_nll_has_the_same_bits_in_any_order(device, dtype, monkeypatch):
    logits, target, weight = problem((7, 2049), dtype, False, device.name)
    found = []
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("NEGLOG_REVERSED", "1")
        copy = logits.clone()
        outputs = device.ops.nll_(copy, target, weight, None, MEAN, -100, *OPTIONS["all"], True, "")
        found.append((*outputs, copy))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


# pairs

FORMS = {
    "rows": {},
    "columns": {"columns": True, "positive": True},
    "scale of each row, bias": {"columns": True, "positive": True, "scales": True, "bias": True},
    "one bias, excluded": {"columns": True, "positive": True, "one_bias": True, "excluded": True},
    "groups": {"columns": True, "positive": True, "groups": True, "scales": True},
    "everything left out": {"columns": True, "empty": True},
    "symmetric": {"symmetric": True, "positive": True, "excluded": True},
}


def pairs(dtype, device, rows, keys, features=5, **form):
    """Cosines, at scores of up to 30: beyond what needs no maximum with the bias."""
    real, every = real_of(dtype), torch.arange(rows)
    symmetric = form.get("symmetric", False)
    query, key = (
        torch.nn.functional.normalize(normal(n, features, seed=n + 1), dim=1).to(dtype).to(device)
        for n in (rows, keys)
    )
    scale = torch.linspace(5, 30, rows) if form.get("scales") else torch.tensor(30.0)
    bias = 20 * normal(keys, seed=3) if form.get("bias") else None
    bias = torch.tensor(3.0) if form.get("one_bias") else bias
    bias = torch.full((keys,), -INF) if form.get("empty") else bias
    positive = every.roll(rows // 2) if symmetric else (every * 3 + 1) % keys
    excluded = every if symmetric else (every * 7) % keys
    groups = form.get("groups", False)
    optional = {
        "bias": None if bias is None else bias.to(real),
        "positive": positive if form.get("positive") else None,
        "excluded": excluded if form.get("excluded") else None,
        "query_group": every % 5 if groups else None,
        "key_group": torch.arange(keys) % 5 if groups else None,
    }
    return Pairs(
        query, query if symmetric else key, scale.to(real).to(device),
        **{name: None if x is None else x.to(device) for name, x in optional.items()},
        columns=form.get("columns", False), symmetric=symmetric, workspace=1, tile_dtype=dtype,
        backend="",
    )  # fmt: skip


def forward(kind, given, keep=False):
    return schedule.forward(kind, schema.forward.Arguments(*given, keep))


def backward(kind, *arguments):
    return schedule.backward(kind, schema.backward.Arguments(*arguments))


def sigmoid(kind, given):
    tiles = (1, given.tile_dtype, "", [True] * 4)
    return schedule.sigmoid(kind, schema.sigmoid.Arguments(*given[:5], *tiles))


def on_cpu(given):
    return given._replace(
        **{name: x.cpu() for name, x in given._asdict().items() if isinstance(x, torch.Tensor)}
    )


def exactly(given, upstream):
    """Outputs and gradients in float64, of the similarities as the tiles have them rounded."""
    wide = {
        name: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in on_cpu(given)._asdict().items()
    }
    exact = Pairs(**wide)._replace(tile_dtype=torch.float64)
    leaves = [exact.query.requires_grad_(), exact.key, exact.scale.requires_grad_()]
    if exact.symmetric:
        exact = exact._replace(key=exact.query)
        leaves[1] = torch.zeros((), requires_grad=True, dtype=torch.float64)
    else:
        exact.key.requires_grad_()
    outputs = formula.pairs(exact)
    total = sum((o * u.cpu().double()).sum() for o, u in zip(outputs, upstream, strict=True))
    return outputs, torch.autograd.grad(total, leaves, allow_unused=True)


def upstream_of(outputs):
    return [normal(len(x), seed=i).to(x.dtype).to(x.device) for i, x in enumerate(outputs)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (66, 131), (130, 300)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_pairs_against_the_composite(device, dtype, shape, form, keep, monkeypatch):
    for name in ("WIDTH", "CUDA_WIDTH"):  # several tiles across, not aligned to any vector
        monkeypatch.setattr(schedule, name, 97)
    rows, keys = shape
    keys = rows if form.get("symmetric") else keys
    if form.get("symmetric") and rows % 2:
        rows = keys = 2
    given = pairs(dtype, device.name, rows, keys, **form)
    with dispatch.record() as ran:
        outputs = forward(CudaTiles, given, keep)
    upstream = upstream_of(outputs[:5])
    exact, leaves = exactly(given, upstream)
    # A similarity in 16 bits is one of 256 or 2048 steps, times the scale.
    allowed = {torch.bfloat16: 6e-2, torch.float16: 8e-3}.get(dtype, 5 * LOSS[dtype])
    for found, expected in zip(outputs[:5], exact, strict=True):
        assert off(found, expected.detach()) <= allowed
    wanted = [True, not given.symmetric, True]
    with dispatch.record() as ran_backward:
        grads = backward(
            CudaTiles, *upstream, *given, outputs[2], outputs[3], outputs[5], outputs[6],
            outputs[7], wanted,
        )  # fmt: skip
    assert (ran, ran_backward) == (["pairs:cuda"], ["pairs_backward:cuda"])
    for found, expected, want in zip(grads, leaves, wanted, strict=True):
        if want:
            expected = torch.zeros(found.shape) if expected is None else expected
            assert off(found, expected) <= 3 * allowed


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_pairs_is_what_the_cpu_has(device, dtype, form):
    """The same similarities, rounded the same: closer than the oracle can tell in 16 bits."""
    rows, keys = (130, 130) if form.get("symmetric") else (130, 300)
    given = pairs(dtype, device.name, rows, keys, **form)
    ours = forward(CudaTiles, given)
    theirs = forward(CpuTiles, on_cpu(given))
    for found, expected in zip(ours[:5], theirs, strict=False):
        assert off(found, expected) <= 5 * LOSS[dtype]
    upstream = upstream_of(ours[:5])
    wanted = [True, not given.symmetric, True]
    saved = [(made[2], made[3], made[5], made[6], made[7]) for made in (ours, theirs)]
    found = backward(CudaTiles, *upstream, *given, *saved[0], wanted)
    expected = backward(CpuTiles, *(x.cpu() for x in upstream), *on_cpu(given), *saved[1], wanted)
    for one, other in zip(found, expected, strict=True):
        assert off(one, other.double()) <= 3 * GRADIENT[dtype]


def test_pairs_of_sure_positives_keeps_its_digits(device):
    """Losses near 0 are sums of small terms beside a 1. A row's are added as a tree in float, whose
    rounding torch has too; a column's, one after the other, keep what the float has no room for."""
    scores = -20 + normal(65, 65)
    scores.diagonal().fill_(0.0)
    every = torch.arange(65, device=device.name)
    similarity = scores.float().to(device.name)
    states = []
    for _ in range(2):
        maximum = torch.full((65,), -INF, device=device.name)
        states.append((maximum, torch.zeros(65, dtype=torch.float64, device=device.name)))
    (row_maximum, row_sum), (column_maximum, column_sum) = states
    device.ops.pairs_tile(
        similarity, torch.ones((), device=device.name), None, every, None, None, None, 0,
        row_maximum, row_sum, column_maximum, column_sum, torch.zeros(65, device=device.name),
    )  # fmt: skip
    exact = similarity.double().cpu()
    off_by = (row_sum.log().cpu() - exact.logsumexp(1)).abs().max()
    assert off_by < 2e-7
    torch.testing.assert_close(column_sum.log().cpu(), exact.logsumexp(0), rtol=1e-5, atol=0)


def test_pairs_has_the_same_bits_in_any_order(device, dtype, monkeypatch):
    given = pairs(dtype, device.name, 130, 300, **FORMS["groups"])
    found = []
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("NEGLOG_REVERSED", "1")
        outputs = forward(CudaTiles, given, True)
        saved = (outputs[2], outputs[3], outputs[5], outputs[6], outputs[7])
        upstream = upstream_of(outputs[:5])
        grads = backward(CudaTiles, *upstream, *given, *saved, [True] * 3)
        found.append((*outputs, *grads))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_pairs_writes_within_its_tile(device, dtype):
    memory = torch.full((67, 200), 7.0, dtype=dtype, device=device.name)
    tile = memory[1:-1, 3:-5]
    numbers = torch.zeros(65, dtype=real_of(dtype), device=device.name)
    one = torch.ones((), dtype=real_of(dtype), device=device.name)
    device.ops.pairs_tile_backward(
        tile.clone(), one, *[None] * 5, 0, numbers, numbers, numbers, *[None] * 6, tile
    )
    assert bool((tile == 0).all())
    tile.fill_(7.0)
    assert bool((memory == 7.0).all())


def test_pairs_refuses_what_it_would_misread(device):
    tile, one = torch.zeros(4, 6, device=device.name), torch.ones((), device=device.name)
    numbers = torch.zeros(4, device=device.name)
    sums = numbers.double()

    def forward(similarity=tile, scale=one, row_sum=sums, **named):
        optional = ("bias", "positive", "excluded", "query_group", "key_group")
        device.ops.pairs_tile(
            similarity, scale, *(named.get(name) for name in optional), 0, numbers, row_sum, None,
            None, None,
        )  # fmt: skip

    for match, wrong in (
        ("row_sum", {"row_sum": numbers}),
        ("scale", {"scale": torch.ones(3, device=device.name)}),
        ("bias", {"bias": numbers}),
        ("positive", {"positive": numbers}),
        ("key_group", {"query_group": numbers.long()}),
        ("similarity: expected columns adjacent", {"similarity": tile.t()[:4, :4]}),
    ):
        with pytest.raises(RuntimeError, match=match):
            forward(**wrong)


@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (66, 131), (130, 300)], ids=str)
def test_siglip_against_the_composite(device, dtype, shape, monkeypatch):
    for name in ("WIDTH", "CUDA_WIDTH"):
        monkeypatch.setattr(schedule, name, 97)
    given = pairs(dtype, device.name, *shape, one_bias=True, positive=True)
    leaves = [x.detach().double().cpu().requires_grad_() for x in given[:4]]
    expected = formula.sigmoid(*leaves, given.positive.cpu())
    exact = torch.autograd.grad(expected, leaves)
    with dispatch.record() as ran:
        loss, *grads = sigmoid(CudaTiles, given)
    assert ran == ["pairs_sigmoid:cuda"]
    allowed = {torch.bfloat16: 6e-2, torch.float16: 8e-3}.get(dtype, 5 * LOSS[dtype])
    assert off(loss, expected.detach()) <= allowed
    for one, other in zip(grads, exact, strict=True):
        assert off(one, other) <= 3 * allowed
    cpu = sigmoid(CpuTiles, on_cpu(given))
    for one, other in zip((loss, *grads), cpu, strict=True):  # of similarities rounded the same
        assert off(one, other.double()) <= 3 * GRADIENT[dtype]


# linear_nll


def linear_forward(*arguments):
    return linear_schedule.forward(CudaRows, linear_schema.forward.Arguments(*arguments))


def linear_backward(*arguments):
    return linear_schedule.backward(CudaRows, linear_schema.backward.Arguments(*arguments))


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
        outputs = forward(*given, None, *tail, stats, wanted, 1, dtype, filter_eps, "")
        grad = normal(*outputs[0].shape, seed=5).to(real).to(place)
        grad_lse = normal(rows, seed=6).to(real).to(place)
        grads = []
        for through_lse in (None, grad_lse):
            made = backward(
                grad, through_lse, *given, outputs[2], *outputs[5:], *tail, [True] * 3, 1, dtype,
                filter_eps, "",
            )  # fmt: skip
            grads += made
        return outputs, grads

    cpu = torch.ops.neglog
    expected, exact = run("cpu", cpu.linear_nll, cpu.linear_nll_backward)
    with dispatch.record() as ran:
        found, grads = run(device.name, linear_forward, linear_backward)
    assert set(ran) == {"linear_nll:cuda", "linear_nll_backward:cuda"}
    for one, other in zip(found[:5], expected, strict=False):
        assert one.dtype == other.dtype
        assert off(one, other) <= 10 * LOSS[dtype]
    for one, other in zip([*found[5:], *grads], [*expected[5:], *exact], strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 3 * GRADIENT[dtype]


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
        outputs = linear_forward(*given, None, None, *tail, stats, wanted, *tiles)
        grads = linear_backward(
            grad, None, *given, None, outputs[2], *outputs[5:], *tail, [True] * 3, *tiles
        )
        return *outputs, *grads

    expected = run()
    monkeypatch.setattr(torch_state, "capturing", lambda device: True)
    with Waits():
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) <= 3 * GRADIENT[dtype]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_pairs_never_waits(device, form):
    rows, keys = (130, 130) if form.get("symmetric") else (130, 300)
    given = pairs(torch.float32, device.name, rows, keys, **form)
    with Waits():
        out = forward(CudaTiles, given)
        saved = (out[2], out[3], out[5], out[6], out[7])
        wanted = [True, not given.symmetric, True]
        backward(CudaTiles, *upstream_of(out[:5]), *given, *saved, wanted)


def test_linear_nll_of_nothing(device):
    given = [torch.zeros(shape, device=device.name) for shape in ((3, 2), (5, 2), (5,))]
    target = torch.full((3,), -100, device=device.name)
    for reduction, expected in ((MEAN, NAN), (SUM, 0.0)):
        loss, *_, dx, dw, db = linear_forward(
            *given, target, None, None, reduction, -100, *OPTIONS["plain"], False, [True] * 3, 1,
            torch.float32, 0.0, "",
        )  # fmt: skip
        assert off(loss, expected) == 0
        assert not any(x.any() for x in (dx, dw, db))
