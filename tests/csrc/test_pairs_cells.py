"""Tiles of similarities in cells of 64 rows: those whose scores lie close together, and others.

A cell is tried with one exp a score if its tile lies at 16-byte boundaries. The same numbers at
others take two, in another kernel: to differ in the last bits shows that both ran.
"""

import pytest
import torch

from tests.support.cuda_devices import GRADIENT, LOSS, normal, off, real_of

INF, NAN = float("inf"), float("nan")
COLUMNS = {
    torch.float64: 128,
    torch.float32: 256,
    torch.bfloat16: 512,
    torch.float16: 512,
}  # a cell's


def tile_of(scores, dtype, device, aligned=True):
    """The scores in memory with room beside every row, at a boundary or past it."""
    rows, columns = scores.shape
    memory = torch.zeros(rows, columns + 64, dtype=dtype, device=device)
    tile = memory[:, 32 : 32 + columns] if aligned else memory[:, 33 : 33 + columns]
    return tile.copy_(scores)


def states(tile, ops, scale, columns=True, **named):
    """Row maximum and sum, column maximum and sum, of an op that begins with nothing."""
    real, found = real_of(tile.dtype), []
    for size in tile.shape:
        found.append(torch.full((size,), -INF, dtype=real, device=tile.device))
        found.append(torch.zeros(size, dtype=torch.float64, device=tile.device))
    optional = [named.get(name) for name in ("bias", "positive", "excluded", "query", "key")]
    ops.pairs_tile(
        tile, scale, *optional, 0, *(found if columns else [*found[:2], None, None]), None
    )
    return found


def lse_of(maximum, total):
    return maximum.double() + total.log()


def gradient(tile, ops, scale, found, grads, columns=True, **named):
    """In place; by the log-sum-exps of `found`, with the gradients of rows and columns given."""
    rows, across = lse_of(*found[:2]), lse_of(*found[2:])
    parts = []
    for lse, grad in zip((rows, across), grads, strict=True):
        high = lse.to(real_of(tile.dtype))
        parts.append([high, (lse - high).nan_to_num(0).to(high.dtype), grad, None])
    optional = [named.get(name) for name in ("bias", "positive", "excluded", "query", "key")]
    out = tile.clone(memory_format=torch.preserve_format)
    out = tile_of(tile, tile.dtype, tile.device, tile.data_ptr() % 16 == 0)
    ops.pairs_tile_backward(
        out, scale, *optional, 0, *parts[0], *(parts[1] if columns else [None] * 4), None, out
    )
    return out


def exact_gradient(scores, grads, columns=True):
    by_row = scores.softmax(1) * grads[0].double().cpu()[:, None]
    return by_row + scores.softmax(0) * grads[1].double().cpu() if columns else by_row


def grads_of(tile):
    return [normal(size, seed=size).to(real_of(tile.dtype)).to(tile.device) for size in tile.shape]


def numbers(dtype, device, rows, cells, extra=0, spread=3.0):
    """Similarities that the dtype holds exactly, and a scale for each row."""
    columns = int(cells * COLUMNS[dtype]) + extra
    similarity = (normal(rows, columns, seed=rows) * spread).to(dtype).double()
    scale = torch.linspace(0.5, 1.5, rows).to(real_of(dtype))
    return similarity, scale.to(device), similarity * scale.double()[:, None]


# One cell and several, and cells cut off by rows, by columns, by both; sums of rows alone.
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("shape", [(64, 1), (128, 2), (68, 1.5), (4, 0.25), (132, 0.5)], ids=str)
def test_close_scores_against_the_oracle(device, dtype, shape, columns):
    similarity, scale, scores = numbers(dtype, device.name, *shape)
    tile = tile_of(similarity, dtype, device.name)
    other = tile_of(similarity, dtype, device.name, aligned=False)
    found = states(tile, device.ops, scale, columns)
    also = states(other, device.ops, scale, columns)
    for axis in range(2 if columns else 1):
        one, two = (lse_of(*of[2 * axis : 2 * axis + 2]) for of in (found, also))
        assert off(one, scores.logsumexp(1 - axis)) <= LOSS[dtype]
        assert off(two, scores.logsumexp(1 - axis)) <= LOSS[dtype]
    assert not torch.equal(found[1], also[1])
    grads = grads_of(tile)
    expected = exact_gradient(scores, grads, columns)
    one = gradient(tile, device.ops, scale, found, grads, columns)
    two = gradient(other, device.ops, scale, also, grads, columns)
    assert off(one, expected) <= GRADIENT[dtype]
    assert off(two, expected) <= GRADIENT[dtype]
    if dtype.itemsize > 2:  # rounded to 16 bits the two may agree
        assert not torch.equal(one, two)


# What one number for a whole cell cannot serve: each is set in a cell of which the rest is close.
FAR = {
    "a row far below": lambda x: x[5].fill_(-200.0),
    "a row far above": lambda x: x[40].fill_(300.0),
    "a column far below": lambda x: x[:, 7].fill_(-150.0),
    "one score far above": lambda x: x[63, 9].fill_(90.0),
    "the first rows far below": lambda x: x[:4].fill_(-400.0),
    "a row of -inf": lambda x: x[9].fill_(-INF),
    "a column of -inf": lambda x: x[:, 3].fill_(-INF),
    "some -inf": lambda x: x[::3, ::5].fill_(-INF),
    "all -inf": lambda x: x.fill_(-INF),
    "inf": lambda x: x[11, 2].fill_(INF),
    "NaN": lambda x: x[11, 2].fill_(NAN),
    "NaN first": lambda x: x[0].fill_(NAN),
    "+-1e4": lambda x: (x[8].fill_(1e4), x[9].fill_(-1e4)),
}


@pytest.mark.parametrize("far", FAR)
def test_scores_far_apart_are_as_exact(device, dtype, far):
    similarity, _, _ = numbers(dtype, device.name, 128, 2)
    FAR[far](similarity)
    similarity = similarity.to(dtype).double()
    scale = torch.ones((), dtype=real_of(dtype), device=device.name)
    tile = tile_of(similarity, dtype, device.name)
    found = states(tile, device.ops, scale)
    for axis in range(2):
        lse = lse_of(*found[2 * axis : 2 * axis + 2])
        expected = similarity.logsumexp(1 - axis)
        if far == "inf":  # of inf - inf nothing is said but that it is not finite
            assert not lse[~expected.isfinite()].isfinite().any()
            lse, expected = (x.where(expected.isfinite().to(x.device), 0) for x in (lse, expected))
        assert off(lse, expected) <= LOSS[dtype]
    grads = grads_of(tile)
    made = gradient(tile, device.ops, scale, found, grads)
    rows, across = (x.isfinite() for x in (similarity.logsumexp(1), similarity.logsumexp(0)))
    sound = rows[:, None] & across  # beside them softmax is NaN in torch, 0 or NaN here
    expected = exact_gradient(similarity, grads)
    assert off(made.cpu().where(sound, 0), expected.where(sound, 0)) <= GRADIENT[dtype]


# Rests of four rows, on both sides of 64; every rest of the shorter vectors, some of the others.
@pytest.mark.parametrize("rows", [1, 3, 63, 65, 66])
@pytest.mark.parametrize("extra", [1, 2, 3, 5, 7])
def test_cells_cut_off_anywhere(device, dtype, rows, extra):
    """Rows that are no multiple of four, columns that are none of a vector."""
    similarity, scale, scores = numbers(dtype, device.name, rows, 1, extra)
    tile = tile_of(similarity, dtype, device.name)
    found = states(tile, device.ops, scale)
    for axis in range(2):
        lse = lse_of(*found[2 * axis : 2 * axis + 2])
        assert off(lse, scores.logsumexp(1 - axis)) <= LOSS[dtype]
    grads = grads_of(tile)
    made = gradient(tile, device.ops, scale, found, grads)
    assert off(made, exact_gradient(scores, grads)) <= GRADIENT[dtype]


@pytest.mark.parametrize("name", ["positive", "excluded"])
def test_a_positive_or_an_excluded_pair_is_left_to_the_other_kernel(device, dtype, name):
    """In the one cell that has it, at either end of the rows, of the columns."""
    similarity, scale, scores = numbers(dtype, device.name, 128, 2)
    tile = tile_of(similarity, dtype, device.name)
    plain = states(tile, device.ops, scale)
    grads = grads_of(tile)
    without = gradient(tile, device.ops, scale, plain, grads)
    for row, column in ((0, 0), (127, 0), (64, -1), (63, COLUMNS[dtype])):
        column %= similarity.shape[1]
        named = torch.full((128,), -1, device=device.name)
        named[row] = column
        held = {name: named}
        found = states(tile, device.ops, scale, **held)
        shown = scores.clone()
        if name == "excluded":
            shown[row, column] = -INF
        for axis in range(2):
            lse = lse_of(*found[2 * axis : 2 * axis + 2])
            assert off(lse, shown.logsumexp(1 - axis)) <= LOSS[dtype]
        made = gradient(tile, device.ops, scale, found, grads, **held)
        assert off(made, exact_gradient(shown, grads)) <= GRADIENT[dtype]
        cell = torch.zeros(similarity.shape, dtype=torch.bool)
        cell[row // 64 * 64 :][:64, column // COLUMNS[dtype] * COLUMNS[dtype] :][
            :, : COLUMNS[dtype]
        ] = True
        if name == "positive":  # without a gradient of its own it changes its cell's bits alone
            made = gradient(tile, device.ops, scale, plain, grads, **held)
            assert torch.equal(made.cpu()[~cell], without.cpu()[~cell])


def test_nothing_beside_the_tile_is_written(device, dtype):
    similarity, scale, _ = numbers(dtype, device.name, 64, 1)
    memory = torch.full((66, similarity.shape[1] + 32), 7.0, dtype=dtype, device=device.name)
    tile = memory[1:-1, 16:-16].copy_(similarity)
    found = states(tile, device.ops, scale)
    zeros = [torch.zeros_like(g) for g in grads_of(tile)]
    parts = [[lse_of(*of).to(zeros[0].dtype), zero, zero, None]
             for of, zero in zip((found[:2], found[2:]), zeros, strict=True)]  # fmt: skip
    device.ops.pairs_tile_backward(tile, scale, *[None] * 5, 0, *parts[0], *parts[1], None, tile)
    assert not tile.any()
    tile.fill_(7.0)
    assert bool((memory == 7.0).all())
