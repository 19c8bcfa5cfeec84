"""What a loss over embeddings means does not depend on how many numbers there are.

Its rows depend on each other, so the truth at each size is torch's formula in float64, which has
one path. test_any_size.py is the same for the losses over classes.
"""

import pytest
import torch

import neglog
from tests.support.backends import BEST
from tests.support.contrastive_cases import FORMS, LOSSES, case, form, gradients, learned, normal

# Similarities that are kept for the backward, that just are not, and that take many tiles. Few
# features, so that these are many rows in little time.
SIZES = (5, 700, 1500)
FEATURES = 4
SMALL_TILES = {"options": {"workspace_mb": 2}}


def compare(loss, arguments, exact, **tolerances):
    """loss(*arguments) by the kernel, value and gradients, with that of float64 by torch."""
    found = loss(*arguments, backend=BEST)
    expected = loss(*exact, backend="torch")
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, **tolerances)
    pairs = zip(
        gradients(found, learned(arguments)), gradients(expected, learned(exact)), strict=True
    )
    for ours, theirs in pairs:
        size = theirs.abs().max().item() if theirs.isfinite().all() else 1.0
        atol = tolerances["rtol"] * size
        torch.testing.assert_close(ours.double(), theirs, **tolerances | {"atol": atol})


def widened(arguments):
    """The same numbers in float64."""
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in arguments
    )


# float64 finds another meaning, float32 another path of a narrower dtype.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name, rows, dtype, rtol):
    arguments = case(name, rows, FEATURES, dtype, temperature=0.3)

    def loss(*arguments, backend):
        return getattr(neglog, name)(*arguments, backend=backend, **SMALL_TILES)

    compare(loss, arguments, widened(arguments), rtol=rtol, atol=rtol)


# Each form of info_nce, with as many negatives.
@pytest.mark.parametrize("rows", SIZES[:2])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_info_nce_is_its_formula(name, rows):
    arguments, options = form(name, "tensor", rows, rows, FEATURES)
    options["options"] = {"workspace_mb": 0.5}

    def loss(query, key, negatives, temperature, backend):
        return neglog.info_nce(
            query, key, negatives, temperature, reduction="none", backend=backend, **options
        )

    compare(loss, arguments, widened(arguments), rtol=1e-9, atol=1e-9)


# As many keys as a queue of MoCo: 30,000, of which one query or many are held against.
@pytest.mark.parametrize("rows", [5, 300])
def test_of_a_queue_of_30000(rows):
    query, key = (normal(rows, FEATURES, seed=seed).requires_grad_() for seed in (0, 1))
    arguments = (query, key, normal(30_000, FEATURES))

    def loss(*arguments, backend):
        return neglog.info_nce(*arguments, reduction="none", backend=backend, **SMALL_TILES)

    compare(loss, arguments, widened(arguments), rtol=1e-9, atol=1e-9)


# One row with NaN, or with inf, of which normalising makes NaN: who becomes NaN is asked.
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_that_is_no_number_spoils_the_same(name, value):
    for rows in SIZES[:2]:
        arguments = case(name, rows, FEATURES, temperature=0.3)
        with torch.no_grad():
            arguments[0][1, 2] = value
        reduction = {} if name in ("clip_loss", "siglip_loss") else {"reduction": "none"}
        found, expected = (
            getattr(neglog, name)(*arguments, backend=backend, **reduction)
            for backend in (BEST, "torch")
        )
        assert torch.equal(found.isnan(), expected.isnan())
        assert not found.isfinite().all()


ERRORS = {
    "features": (RuntimeError, "expected 4 features", lambda x: (x, x[:, :2]), {}),
    "rows": (RuntimeError, "expected <rows> rows", lambda x: (x, x[1:]), {}),
    "dtype": (RuntimeError, "expected dtype torch.float32", lambda x: (x, x.double()), {}),
    "temperature": (ValueError, "temperature: expected a number above 0", lambda x: (x, x),
                    {"temperature": 0.0}),
    "reduction": (ValueError, "reduction: expected", lambda x: (x, x), {"reduction": "avg"}),
    "workspace": (ValueError, "workspace_mb: expected", lambda x: (x, x),
                  {"options": {"workspace_mb": -1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "dcl"])
@pytest.mark.parametrize("rows", SIZES)
def test_the_same_is_refused(name, rows):
    for error, message, arguments, options in ERRORS.values():
        with pytest.raises(error, match=message.replace("<rows>", str(rows))):
            getattr(neglog, name)(*arguments(torch.ones(rows, 4)), **options)
