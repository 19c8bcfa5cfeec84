"""What all contrastive losses share: values, gradients, precision, edges, against the formulas."""

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
            by_rows = name == "info_nce" and workspace and options["reduction"] != "none"
            if by_rows and backend != "torch":  # rows alone, and not kept: keys are classes
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


def test_the_kernels_take_every_size():
    for rows in (1, 100, 700):
        with dispatch.record() as ran:
            neglog.info_nce(*pair(rows))
        assert ran == [f"pairs:{dispatch.best('cpu')}"]
