"""Logits, targets and options for tests of nll, and how exact its results must be."""

from __future__ import annotations

from typing import Any

import numpy as np

# Options of nll, each with all it interacts with.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight, smoothing, z_loss": {"weight": True, "label_smoothing": 0.3, "z_loss": 1e-2},
    "token_weight": {"token_weight": True},
    "scale, softcap": {"logit_scale": 0.5, "softcap": 3.0},
    "all": {
        "weight": True,
        "token_weight": True,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "logit_scale": 1.7,
        "softcap": 30.0,
    },
}
# Rounding of one output and of the sums behind it; only gradients are float16. A gradient carries
# the rounding of its score too: half an ulp of z = 17 is a relative error of 1e-6 in p.
BUDGET = {"float32": 6e-7, "float64": 2e-15, "float16": 6e-7}
GRADIENT_BUDGET = {"float32": 2e-6, "float64": 5e-15, "float16": 5e-4}


def drawn_weights(options: dict, rows: int, vocab: int, rng: np.random.Generator) -> dict:
    """The options with weights drawn for these classes and rows if they have weights. One row's is
    0, and one below."""
    drawn = dict(options)
    if options.get("weight"):
        drawn["weight"] = rng.uniform(0.1, 2.0, vocab).astype(np.float32)
    if options.get("token_weight"):
        drawn["token_weight"] = np.linspace(-0.5, 2.0, rows, dtype=np.float32)
        drawn["token_weight"][1:2] = 0
    return drawn


def draw(rng, rows, vocab, dtype, probabilities=False):
    """Logits with a row stride beyond the vocabulary, and targets with an ignored row."""
    wide = (rng.standard_normal((rows, vocab + 3)) * 3).astype(dtype)
    logits = wide[:, :vocab]
    if probabilities:
        return logits, rng.dirichlet(np.ones(vocab), rows).astype(dtype)
    target = rng.integers(0, vocab, rows)
    target[rows // 2] = -100
    return logits, target


def extreme_rows(dtype):
    big = 1e4 if dtype != "float64" else 1e9
    inf, nan = np.inf, np.nan
    return np.array(
        [
            [big, -big, 0, 1, 2],
            [-big, -big, -big, -big, -big],
            [big, big - 8, big, big, big],
            [-inf, 0, -inf, 1, -inf],
            [-inf, -inf, -inf, -inf, -inf],
            [inf, 0, 0, 0, 0],
            [inf, inf, 0, 0, 0],
            [0, nan, 0, 0, 0],
            [nan, nan, nan, nan, nan],
            [-inf, nan, -inf, -inf, -inf],
            [0, 0, 0, 0, 0],
        ],
        dtype,
    )
