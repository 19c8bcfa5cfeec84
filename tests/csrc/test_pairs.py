"""The CUDA kernels of pairs, and the schedule over them: on a GPU and, emulated, on the CPU."""

import pytest
import torch

from neglog import dispatch
from neglog.ops.pairs import formula, schedule, schema
from neglog.ops.pairs.cpu import CpuTiles
from neglog.ops.pairs.cuda import CudaTiles
from neglog.ops.pairs.schema import Pairs
from tests.support.cuda_devices import GRADIENT, LOSS, Waits, normal, off, real_of

INF = float("inf")
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
    groups = (given.query_group, given.key_group)
    return schedule.sigmoid(kind, schema.sigmoid.Arguments(*given[:5], *groups, *tiles))


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


# Less than a cell, one and a rest, several; what each optional argument adds; scores that are kept
# and scores that are made again.
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


# What each optional argument adds, in each dtype.
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


# As above; all pairs, and without those of one group.
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (66, 131), (130, 300)], ids=str)
def test_siglip_against_the_composite(device, dtype, shape, groups, monkeypatch):
    for name in ("WIDTH", "CUDA_WIDTH"):
        monkeypatch.setattr(schedule, name, 97)
    given = pairs(dtype, device.name, *shape, one_bias=True, positive=True, groups=groups)
    leaves = [x.detach().double().cpu().requires_grad_() for x in given[:4]]
    expected = formula.sigmoid(Pairs(*leaves, *on_cpu(given)[4:]))
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


# What each optional argument adds.
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_pairs_never_waits(device, form):
    rows, keys = (130, 130) if form.get("symmetric") else (130, 300)
    given = pairs(torch.float32, device.name, rows, keys, **form)
    with Waits():
        out = forward(CudaTiles, given)
        saved = (out[2], out[3], out[5], out[6], out[7])
        wanted = [True, not given.symmetric, True]
        backward(CudaTiles, *upstream_of(out[:5]), *given, *saved, wanted)
