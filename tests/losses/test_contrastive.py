"""What all contrastive losses share: values, gradients, precision, edges, against the formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.backends import BEST, NUMBA
from tests.support.contrastive_cases import (
    LOSSES,
    OF_ONE_NUMBER,
    TILES,
    case,
    gradients,
    learned,
    normal,
    of_learned,
    pair,
)


def both(name, arguments, **options):
    """Loss and gradients by neglog, and by the formula."""
    reduction = {key: value for key, value in options.items() if key == "reduction"}
    found = getattr(neglog, name)(*arguments, **options)
    expected = getattr(formulas, name)(*arguments, **reduction)
    inputs = learned(arguments)
    return (found, gradients(found, inputs)), (expected, gradients(expected, inputs))


def reductions(name):
    return ("mean",) if name in OF_ONE_NUMBER else ("none", "mean", "sum")


# Both dtypes that sums are formed in; 16-bit similarities are in test_error_is_within_torchs.
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agrees_with_the_formula(backend, name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    arguments = case(name, dtype=dtype)
    for reduction in reductions(name):
        options = {} if name in OF_ONE_NUMBER else {"reduction": reduction}
        for workspace in (TILES, None):
            with dispatch.record() as ran:
                ours, theirs = both(name, arguments, options=workspace, **options)
            op = "pairs_sigmoid" if name == "siglip_loss" else "pairs"
            by_rows = name == "info_nce" and options["reduction"] != "none"
            if by_rows and backend != "torch":  # rows alone: keys are classes
                op = "linear_nll"
            assert ran[0] == f"{op}:{backend}"
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# Features within one product and over several; rows of one tile, of parts of one, and of several.
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("features", [1, 3, 384, 640, 1152])
def test_sizes(kernel_backend, name, features):
    options = {} if name in OF_ONE_NUMBER else {"reduction": "sum"}
    for rows in (1, 2, 7, 31, 257, *((700,) if features in (3, 640) else ())):
        if rows == 1 and name == "dcl":
            continue  # nothing to be held against: see test_empty_batches
        arguments = case(name, rows, features, torch.float32)
        ours, theirs = both(name, arguments, **options)
        scale = 1 + abs(float(theirs[0].detach()))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5 * scale)


# Other libraries


# Precision


def errors(name, arguments, function, **options):
    """Relative errors of loss and gradients against float64."""
    loss = function(*arguments, **options)
    exact = [x.detach().double().requires_grad_(x.requires_grad)
             if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for x in arguments]  # fmt: skip
    truth = getattr(formulas, name)(*exact)
    found = (loss, *torch.autograd.grad(loss, learned(arguments)))
    expected = (truth, *torch.autograd.grad(truth, learned(exact)))
    return [
        float((f.detach().double() - t.detach()).norm() / t.norm().detach())
        for f, t in zip(found, expected, strict=True)
    ]


# Scores of 2, 14 and 100. Tiles of each dtype by the best build; for Numba's of 16 bits see
# tests/kernels.
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((name, torch.float32) for name in NUMBA),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_error_is_within_torchs(backend, name, dtype, temperature):
    arguments = case(name, 600, 40, dtype, temperature)
    ours = errors(name, arguments, getattr(neglog, name), backend=backend)
    theirs = errors(name, arguments, getattr(formulas, name))
    # The error of one number, the loss or the gradient of the temperature, is a matter of luck.
    of_one = max(1e-6, torch.finfo(dtype).eps)
    # Either rounds similarities to 16 bits once, but this formula after they are scaled: 0.6 and 60
    # have other distances to the next power of two.
    factor = 2.0 if name == "clip_loss" and dtype != torch.float32 else 1.2
    sizes = [1, *(x.numel() for x in learned(arguments))]
    for mine, other, size in zip(ours, theirs, sizes, strict=True):
        assert mine <= factor * other + (of_one if size == 1 else 1e-6), (ours, theirs)


# By rows, by columns too, of symmetric similarities, and with several positives.
@pytest.mark.parametrize("name", ["info_nce", "clip_loss", "nt_xent", "sup_con"])
def test_logits_of_a_hundred(backend, name):
    """e^100 is not a float32, and rows whose best score is -100 must not vanish beside others."""
    arguments = list(case(name, 400, 30, torch.float32, temperature=0.01))
    common = F.normalize(normal(1, 30, dtype=torch.float32))
    with torch.no_grad():
        arguments[0][:200] = common + 0.02 * arguments[0][:200]
        for x in arguments[1:2] if name != "sup_con" else ():
            x[:] = -common + 0.02 * x
        arguments[:2] = [F.normalize(x) if x.is_floating_point() else x for x in arguments[:2]]
    arguments = [x.requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
                 for x in arguments]  # fmt: skip
    ours = errors(name, arguments, getattr(neglog, name), options=TILES)
    theirs = errors(name, arguments, getattr(formulas, name))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.2 * other + 2e-6, (ours, theirs)


EXCLUDING = [name for name in LOSSES if name not in ("info_nce", "sup_con")]


# Ids of some, of all, and any integers; one row and rests of blocks; several tiles.
@pytest.mark.parametrize("rows", [1, 2, 7, 31, 300])
@pytest.mark.parametrize("ids", ["some", "all", "extreme"])
@pytest.mark.parametrize("name", EXCLUDING)
def test_rows_of_one_id_are_no_negatives(backend, name, ids, rows):
    if name == "dcl" and (ids == "all" or rows == 1):
        return  # nothing to be held against: test_nt_xent.py has that
    extremes = [torch.iinfo(torch.int64).min, -1, 0, torch.iinfo(torch.int64).max]
    exclude = {
        "some": (torch.arange(rows) * 5 % max(2, rows // 2)).to(torch.int32),
        "all": torch.full((rows,), 3),
        "extreme": torch.tensor(extremes)[torch.arange(rows) % 4],
    }[ids]
    arguments = case(name, rows, 6, temperature=0.3)
    with dispatch.record() as ran:
        found = getattr(neglog, name)(*arguments, exclude=exclude, options=TILES)
        grads = gradients(found, learned(arguments))
    assert {part.partition(":")[2] for part in ran} == {backend}
    expected = getattr(formulas, name)(*arguments, exclude=exclude)
    torch.testing.assert_close(found, expected.mean(), rtol=1e-9, atol=1e-10)
    expected = gradients(expected.mean(), learned(arguments), allow_unused=True)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-10)


# Tiles of 16 bits, and of float32 by both kinds of kernels.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXCLUDING)
def test_error_without_rows_of_one_id_is_within_torchs(kernel_backend, name, dtype):
    arguments, exclude = case(name, 300, 40, dtype), torch.arange(300) % 40
    found = getattr(neglog, name)(*arguments, exclude=exclude)
    formula = partial(getattr(formulas, name), exclude=exclude)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = (formula(*exact).mean(), *gradients(formula(*exact).mean(), exact))
    of_torch = formula(*arguments).mean()
    theirs = (of_torch, *gradients(of_torch, learned(arguments)))
    for mine, other, t in zip((found, *gradients(found, learned(arguments))), theirs, truth,
                              strict=True):  # fmt: skip
        error, allowed = ((x.double() - t).norm() / t.norm() for x in (mine, other))
        assert error <= 2 * allowed + max(1e-6, torch.finfo(dtype).eps * (t.dim() == 0))


@pytest.mark.parametrize("name", EXCLUDING)
def test_derivatives_without_rows_of_one_id(name):
    loss = partial(getattr(neglog, name), exclude=torch.tensor([0, 1, 0, 1, 2]))
    function, inputs = of_learned(loss, case(name, 5, 3, temperature=0.5))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Each reduction of nothing is another number.
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_batches(backend, name, reduction):
    arguments = case(name, 0)
    if name in OF_ONE_NUMBER:
        assert getattr(neglog, name)(*arguments).isnan()
        return
    loss = getattr(neglog, name)(*arguments, reduction=reduction)
    expected = getattr(formulas, name)(*arguments, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    found = torch.autograd.grad(loss.sum(), learned(arguments), allow_unused=True)
    assert all(g is None or g.shape == x.shape
               for g, x in zip(found, learned(arguments), strict=True))  # fmt: skip


# A mean over nothing has an upstream that is not finite.
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_has_gradients_of_zero(backend, name):
    arguments = case(name, 0, 3)
    options = {} if name in OF_ONE_NUMBER else {"reduction": "mean"}
    loss = getattr(neglog, name)(*arguments, **options)
    for found in torch.autograd.grad(loss, learned(arguments), allow_unused=True):
        assert found is None or not found.any()


# In each argument of rows; dot products, as a normalised row of inf is NaN.
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("form", ["rows", "symmetric", "queue", "in_batch", "paired"])
def test_what_is_not_finite_spoils_what_it_spoils_in_torch(backend, form, smoothing, value):
    """One number of one row: every row's loss is what the formula says, finite, inf or NaN."""
    options = {"symmetric": form == "symmetric", "normalize": False, "label_smoothing": smoothing}
    for place in range(2 if form in ("rows", "symmetric") else 3):
        inputs = [*pair(6, 3), normal(6, 2, 3) if form == "paired" else normal(5, 3)]
        inputs = [x.detach() for x in inputs[: 2 if form in ("rows", "symmetric") else 3]]
        inputs[place].view(-1)[4] = value
        if len(inputs) == 3:
            options["negative_mode"] = "unpaired" if form == "queue" else form
        given = {"reduction": "none", "temperature": 0.7, **options}
        found, expected = neglog.info_nce(*inputs, **given), formulas.info_nce(*inputs, **given)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_sup_con_of_a_feature_that_is_not_finite(backend, normalize, value):
    """Rows that have a mate; one that has none counts as 0, whatever its features."""
    x, labels = normal(8, 3, seed=3), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    x[2, 1] = value
    found = neglog.sup_con(x, labels, 0.5, "none", normalize=normalize)
    y = F.normalize(x, dim=1) if normalize else x
    scores = (y @ y.t() / 0.5).fill_diagonal_(-torch.inf)
    log_p, mates = torch.log_softmax(scores, 1), formulas.others_of_an_id(labels)
    expected = torch.stack([-log_p[i][mates[i]].mean() if mates[i].any() else log_p.new_zeros(())
                            for i in range(8)])  # fmt: skip
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not found[2].isfinite()


def test_the_kernels_take_every_size():
    for rows in (1, 100, 700):
        with dispatch.record() as ran:
            neglog.info_nce(*pair(rows))
        assert ran == [f"linear_nll:{dispatch.best('cpu')}"]
