"""neglog.similarity_logsumexp against the oracle, its arguments and its errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch, reference
from tests.support.allocations import largest_allocation
from tests.support.backends import BEST
from tests.support.contrastive_cases import TILES, gradients, normal

# Rows, keys: one, odd, several tiles.
SHAPES = [(1, 1), (1, 7), (2, 31), (31, 2), (257, 300)]


def inputs(rows, keys, features=24, dtype=torch.float64):
    both = normal(rows, features), normal(keys, features, seed=1)
    return [x.to(dtype).requires_grad_() for x in both]


def columns_of(rows, keys, step):
    return torch.arange(rows) * step % keys


def options_of(name, rows, keys):
    ids = torch.arange(rows) % 5, torch.arange(keys) % 7
    return {
        "all": {},
        "excluded": {"excluded": columns_of(rows, keys, 3)},
        "some excluded": {"excluded": torch.where(torch.arange(rows) % 2 == 0, -1, 0)},
        "ids": {"query_ids": ids[0], "key_ids": ids[1]},
        "ids, positive": {
            "query_ids": ids[0], "key_ids": ids[1], "positive": columns_of(rows, keys, 2)
        },
        "small ids": {"query_ids": ids[0].to(torch.int8), "key_ids": ids[1].to(torch.uint8)},
    }[name]  # fmt: skip


OPTIONS = ["all", "excluded", "some excluded", "ids", "ids, positive", "small ids"]


def of_oracle(query, key, temperature, options, upstream, normalize=True):
    """Value, and gradient of the similarities, in float64."""
    q, k = (F.normalize(x.double(), dim=1) if normalize else x.double() for x in (query, key))
    numbers = {name: value.numpy() for name, value in options.items()}
    renamed = {"query_ids": "row_group", "key_ids": "column_group"}
    found = reference.pairs(
        (q @ k.T).detach().numpy(), scale=1 / np.asarray(temperature),
        grad_row_lse=upstream.double().numpy(),
        **{renamed.get(name, name): value for name, value in numbers.items()},
    )  # fmt: skip
    scores = q @ k.T / torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    grads = torch.autograd.grad(scores, (query, key), torch.from_numpy(found.grad))
    return torch.from_numpy(found.row_lse), [g.double() for g in grads]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("rows", "keys"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_of_the_oracle(backend, dtype, rows, keys, name):
    options = options_of(name, rows, keys)
    given = inputs(rows, keys, dtype=dtype)
    upstream = torch.linspace(0.5, 2, rows, dtype=torch.float64)
    with dispatch.record() as ran:
        found = neglog.similarity_logsumexp(*given, 0.2, **options, options=TILES)
    assert {op.split(":")[1] for op in ran} == {backend}
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    expected, grads = of_oracle(*given, 0.2, options, upstream)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    if expected.isfinite().all():
        ours = torch.autograd.grad(found, given, upstream.to(found.dtype))
        for one, other in zip(ours, grads, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * 4)


def test_all_left_out(backend):
    """-inf, and no gradient."""
    given = inputs(3, 2)
    ids = torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    found = neglog.similarity_logsumexp(*given, query_ids=ids[0], key_ids=ids[1])
    assert torch.equal(found, torch.full((3,), -torch.inf, dtype=torch.float64))


def test_extremes(backend):
    """Products of +-1e4 and a low temperature."""
    query, key = (1e4 * x.detach().sign() for x in inputs(7, 31, dtype=torch.float32))
    found = neglog.similarity_logsumexp(query, key, 1e-3, normalize=False)
    expected = torch.logsumexp(query.double() @ key.double().T / 1e-3, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_gradient_of_the_temperature(backend):
    query, key = inputs(31, 40)
    for shape in ([], [31]):
        temperature = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        found = neglog.similarity_logsumexp(query, key, temperature)
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        tau = temperature if not shape else temperature[:, None]
        expected = torch.logsumexp(q @ k.T / tau, 1)
        torch.testing.assert_close(
            gradients(found, [query, key, temperature]),
            gradients(expected, [query, key, temperature]),
        )


def test_second_derivatives(backend):
    given = inputs(4, 5, 3)
    excluded = torch.tensor([0, 1, -1, 4])
    assert torch.autograd.gradgradcheck(
        lambda q, k: neglog.similarity_logsumexp(q, k, 0.5, excluded=excluded), given
    )


def test_two_kinds_of_keys_are_one_softmax(backend):
    query, key = inputs(31, 40)
    other = normal(50, 24, seed=2)
    parts = [neglog.similarity_logsumexp(query, k, 0.1) for k in (key, other)]
    whole = neglog.similarity_logsumexp(query, torch.cat([key, other]), 0.1)
    torch.testing.assert_close(torch.logaddexp(*parts), whole)


def test_no_matrix_of_similarities():
    given = inputs(2000, 3000, dtype=torch.float32)
    with dispatch.record() as ran:
        largest = largest_allocation(
            lambda: neglog.similarity_logsumexp(
                *given, 0.1, options={"workspace_mb": 1}
            ).sum().backward()
        )  # fmt: skip
    assert {op.split(":")[1] for op in ran} == {BEST}
    assert largest < 2000 * 3000 * 4 / 8


Q, K = inputs(3, 4, dtype=torch.float32)
IDS = torch.arange(4)
ERRORS = {
    "no tensor": (TypeError, "query: expected a Tensor", lambda: neglog.similarity_logsumexp(1, K)),
    "features": (
        RuntimeError, r"key: expected 24 features, those of query, got \[4, 9\]",
        lambda: neglog.similarity_logsumexp(Q, K.detach()[:, :9]),
    ),
    "temperature": (
        ValueError, "temperature: expected a number above 0",
        lambda: neglog.similarity_logsumexp(Q, K, 0),
    ),
    "positive": (
        IndexError, "positive: expected columns from 0 to 3, got 4",
        lambda: neglog.similarity_logsumexp(Q, K, positive=IDS[1:] + 1),
    ),
    "excluded": (
        IndexError, "excluded: expected columns from -1 to 3, got -2",
        lambda: neglog.similarity_logsumexp(Q, K, excluded=IDS[:3] - 2),
    ),
    "shape": (
        RuntimeError, r"excluded: expected shape \[3\], got \[4\]",
        lambda: neglog.similarity_logsumexp(Q, K, excluded=IDS),
    ),
    "floats": (
        RuntimeError, "positive: expected integers, got torch.float32",
        lambda: neglog.similarity_logsumexp(Q, K, positive=IDS[:3].float()),
    ),
    "one of the ids": (
        ValueError, "key_ids: expected integers, as query_ids are given, got None",
        lambda: neglog.similarity_logsumexp(Q, K, query_ids=IDS[:3]),
    ),
    "ids": (
        RuntimeError, r"key_ids: expected shape \[4\], got \[3\]",
        lambda: neglog.similarity_logsumexp(Q, K, query_ids=IDS[:3], key_ids=IDS[:3]),
    ),
    "backend": (
        ValueError, "backend", lambda: neglog.similarity_logsumexp(Q, K, backend="fast"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, text, call = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()
