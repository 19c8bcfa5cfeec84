"""Which keys are negatives of a query in neglog.info_nce: ids that leave some out, own weights."""

from functools import partial

import pytest
import torch

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.contrastive_cases import (
    TEMPERATURES,
    TILES,
    gradients,
    learned,
    normal,
    of_learned,
    pair,
    temperature_of,
)
from tests.support.contrastive_formulas import INF

LOWEST = torch.iinfo(torch.int64).min
# (M,) ids, or (N, M) of each query's own.
FORMS = {"unpaired": "M", "in_batch": "M", "paired": "M", "paired, own ids": "NM"}


def ids_case(name, temperature="tensor", rows=31, keys=7, features=5, dtype=torch.float64):
    """Inputs, and options with ids of which each query shares some."""
    mode = name.partition(",")[0]
    shape = (rows, keys, features) if mode == "paired" else (keys, features)
    tau = temperature_of(temperature, rows, dtype)
    ids = torch.arange(rows * keys).view(rows, keys) if FORMS[name] == "NM" else torch.arange(keys)
    inputs = (*pair(rows, features, dtype), normal(*shape, dtype=dtype).requires_grad_(), tau)
    options = {"negative_mode": mode, "exclude": torch.arange(rows) % 5, "negative_ids": ids % 3}
    return inputs, options


# Each source of negatives, with all that scales them.
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FORMS)
def test_ids_of_negatives(backend, name, temperature):
    inputs, options = ids_case(name, temperature)
    for weight in (0.0, 0.7):
        options["hard_negative_weight"] = weight
        with dispatch.record() as ran:
            ours = neglog.info_nce(*inputs, reduction="none", options=TILES, **options)
        in_memory = backend == "torch" or options["negative_mode"] == "paired"
        assert ran == [f"pairs:{'torch' if in_memory else backend}"]
        theirs = formulas.info_nce(*inputs, reduction="none", **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        found, expected = (gradients(loss, learned(inputs)) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# One row or key, and rests of blocks; tiles of 16 bits.
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (7, 2), (31, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_sizes_and_dtypes(backend, name, dtype, size):
    inputs, options = ids_case(name, "number", *size, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    found = neglog.info_nce(*inputs, reduction="sum", **options)
    expected = formulas.info_nce(*exact, inputs[3], reduction="sum", **options)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    grads = gradients(found, inputs[:3]), gradients(expected, exact)
    for mine, truth in zip(*grads, strict=True):
        assert (mine - truth).norm() <= tolerance * (1 + truth.norm())


# As above.
@pytest.mark.parametrize("name", FORMS)
def test_statistics_of_ids(backend, name):
    inputs, options = ids_case(name)
    stats = neglog.info_nce(*inputs, return_stats=True, options=TILES, **options)
    scores, target = formulas.info_nce_scores(*inputs, **options)
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(scores, 1))
    assert torch.equal(stats.correct, scores.argmax(1) == target)
    entropy = torch.special.entr(torch.softmax(scores, 1)).sum(1).detach()
    torch.testing.assert_close(stats.entropy, entropy)


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_of_ids(name):
    inputs, options = ids_case(name, "of each row", rows=4, keys=3, features=2)
    function, inputs = of_learned(partial(neglog.info_nce, **options), inputs)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_queue_of_one_id_alone(backend):
    """A query whose every negative has its id: nothing is held against it."""
    (query, key, queue, _), _ = ids_case("unpaired", rows=3, keys=2)
    loss = neglog.info_nce(query, key, queue, exclude=torch.tensor([4, 4, 5]), reduction="none",
                           negative_ids=torch.tensor([4, 4]))  # fmt: skip
    assert loss[:2].tolist() == [0, 0]
    assert loss[2] > 0
    assert all(x.isfinite().all() for x in gradients(loss, (query, key, queue)))


# Any integer may be an id: the smallest, such as a NaT or a hash, and those beside it.
@pytest.mark.parametrize("lowest", [LOWEST, LOWEST + 1, -1, 0])
def test_every_integer_is_an_id(backend, lowest):
    """Further keys without ids are in nobody's group, whatever the ids of the rows."""
    query, key = pair(7, 5)
    further = normal(4, 5)
    ids = torch.tensor([lowest, lowest, 3, 3, torch.iinfo(torch.int64).max, 8, 9])
    given = {"exclude": ids, "reduction": "none", "negative_mode": "in_batch"}
    torch.testing.assert_close(
        neglog.info_nce(query, key, further, **given),
        formulas.info_nce(query, key, further, **given),
    )
    z, labels = torch.cat([query, key]), ids.repeat(2)
    torch.testing.assert_close(neglog.sup_con(z, labels), formulas.sup_con(z, labels))


# A number, and a tensor; with weights of all, padding among them; one row and rests of blocks.
@pytest.mark.parametrize("rows", [1, 2, 7, 31])
@pytest.mark.parametrize("weights", [0.0, "M"])
def test_own_hard_negatives(backend, rows, weights):
    query, key = pair(rows, 5)
    negatives, tau = normal(rows, 5, seed=4).requires_grad_(), torch.tensor(0.2, requires_grad=True)
    if weights == "M":
        weights = normal(rows, seed=5)
        weights[::3] = -INF
    given = {"hard_negative_weight": weights, "negative_mode": "in_batch"}
    inputs = (query, key, negatives, tau)
    for smoothing in (0.0, 0.3):
        # F.cross_entropy spreads over what is left out too.
        if smoothing and isinstance(weights, torch.Tensor):
            continue
        options = {**given, "label_smoothing": smoothing, "reduction": "none"}
        with dispatch.record() as ran:
            ours = neglog.info_nce(
                *inputs, own_negative_weight=torch.tensor(1.3), options=TILES, **options
            )
        assert ran == [f"pairs:{backend}"]
        number = neglog.info_nce(*inputs, own_negative_weight=1.3, options=TILES, **options)
        torch.testing.assert_close(ours, number)
        theirs = formulas.info_nce(*inputs, own_negative_weight=1.3, **options)
        torch.testing.assert_close(number, theirs, rtol=1e-9, atol=1e-10)
        grads = (gradients(loss, inputs) for loss in (number, theirs))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


# 16 bits, whose tiles may be rounded.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_hard_negatives_as_simcse_adds_them(backend, dtype):
    """SimCSE's code: weight on the diagonal of the scores of hard negatives, and there alone."""
    z1, z2, z3 = (normal(31, 8, seed=s, dtype=dtype) for s in range(3))
    scores = torch.cat([formulas.cosines(z1.double(), x.double()) for x in (z2, z3)], 1) / 0.05
    weights = torch.cat([torch.zeros(31, 31), torch.eye(31)], 1)
    expected = torch.nn.functional.cross_entropy(scores + weights, torch.arange(31))
    found = neglog.info_nce(z1, z2, z3, 0.05, negative_mode="in_batch", own_negative_weight=1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    of_all = neglog.info_nce(z1, z2, z3, 0.05, negative_mode="in_batch", hard_negative_weight=1.0)
    assert of_all > found


def test_statistics_of_own_hard_negatives(backend):
    inputs, options = ids_case("in_batch", rows=31, keys=31)
    options["own_negative_weight"] = 2.0
    stats = neglog.info_nce(*inputs, return_stats=True, options=TILES, **options)
    scores, target = formulas.info_nce_scores(*inputs, **options)
    torch.testing.assert_close(stats.loss, formulas.info_nce(*inputs, **options))
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(scores, 1))
    assert torch.equal(stats.correct, scores.argmax(1) == target)
    entropy = torch.special.entr(torch.softmax(scores, 1)).sum(1).detach()
    torch.testing.assert_close(stats.entropy, entropy)


def test_derivatives_of_own_hard_negatives():
    inputs, options = ids_case("in_batch", "of each row", rows=4, keys=4, features=2)
    weight = torch.tensor([0.5, -INF, 0.0, 1.0], dtype=torch.float64)
    loss = partial(neglog.info_nce, own_negative_weight=0.7, hard_negative_weight=weight, **options)
    function, inputs = of_learned(loss, inputs)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# What has a fixed size, as it is made inside, beside rows of any number.
FIXED = {
    "weights": lambda q, k, n: neglog.info_nce(q, k, n, hard_negative_weight=torch.zeros(7)),
    "ids": lambda q, k, n: neglog.info_nce(
        q, k, n, exclude=torch.arange(9) % 3, negative_ids=torch.arange(7)
    ),
}


@pytest.mark.parametrize("loss", FIXED.values(), ids=FIXED.keys())
def test_a_fixed_size_compiles_whole_beside_symbolic_ones(loss):
    torch.compiler.reset()
    inputs = (*pair(9, 5), normal(7, 5))
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))


@pytest.mark.parametrize("name", [*FORMS, "own"])
def test_compiles_whole(name):
    torch.compiler.reset()
    if name == "own":
        inputs, options = ids_case("in_batch", rows=9, keys=9)
        options["own_negative_weight"] = 1.5
    else:
        inputs, options = ids_case(name, rows=9)
    loss = partial(neglog.info_nce, **options)
    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(ours, loss(*inputs))
    grads = (gradients(x, learned(inputs)) for x in (ours, loss(*inputs)))
    torch.testing.assert_close(*grads)
