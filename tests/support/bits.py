"""Hashes of losses and gradients, to show that a change of structure changes no bit.

    python -m tests.support.bits before.json             # in the old tree
    python -m tests.support.bits after.json before.json  # in the new one: prints what differs

One process for each CPU build, for Numba and for the emulated CUDA ops. Hashes of two machines
differ where a matmul takes part; those of two trees on one machine must not. The matmul is BLAS's
on one thread, so that the clock decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FIXED = {"NEGLOG_MATMUL": "blas", "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
NONE, MEAN, SUM = 0, 1, 2


def digest(values: Any) -> str:
    """Of all tensors in the order they come."""
    found = hashlib.sha256()
    for value in values:
        if value is not None:
            raw = value.detach().contiguous().flatten().view(_torch().uint8)
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(raw.numpy().tobytes())
    return found.hexdigest()[:16]


def _torch() -> Any:
    import torch

    return torch


def normal(*shape: int, seed: int) -> Any:
    torch = _torch()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(call: Callable[..., Any], *inputs: Any) -> str:
    """The result of a call, and the gradients of its inputs for an upstream that is not uniform."""
    torch = _torch()
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = call(*(x * 1 for x in leaves))
    stats = list(result) if isinstance(result, tuple) else [result]
    loss = stats[0].double()
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    total = (loss * upstream).sum()
    if len(stats) > 1 and stats[1].requires_grad:
        total = total + 0.25 * stats[1].double().sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return digest([*stats, *gradients])


# Public functions


NLL_OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "scale, softcap, z_loss": {"logit_scale": 1.5, "softcap": 7.0, "z_loss": 0.01},
    "num_items": {"num_items": 17},
    "stats": {"return_stats": True},
    "in place": {"inplace_backward": True},
    "in place, sum": {"inplace_backward": True, "reduction": "sum", "label_smoothing": 0.2},
}
LINEAR_OPTIONS: dict[str, dict[str, Any]] = {
    "one tile": {"options": {"workspace_mb": 64}},
    "many tiles": {"options": {"workspace_mb": 0.3}},
    "none": {"reduction": "none", "options": {"workspace_mb": 0.3}},
    "stats": {"return_stats": True, "softcap": 5.0},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"},
    "filter": {"options": {"filter_eps": 1e-3, "workspace_mb": 0.3}},
    "shift": {"shift": True},
    "num_items": {"num_items": 29.5},
}
KEPT, AGAIN = {"workspace_mb": 256}, {"workspace_mb": 0.2}


def nll_calls(backend: str, dtype: Any) -> Iterator[tuple[str, str]]:
    import neglog

    torch = _torch()
    rows, vocab = 41, 1031
    logits = (3 * normal(rows, vocab, seed=1)).to(dtype)
    target = (normal(rows, seed=2).abs() * 1e6).long() % vocab
    target[::5] = -100
    weight = (normal(vocab, seed=3).abs() + 0.5).to(dtype)
    probabilities = normal(rows, vocab, seed=4).softmax(1).to(dtype)
    for name, options in NLL_OPTIONS.items():

        def call(x: Any, options: dict = options) -> Any:
            return neglog.cross_entropy(x, target, backend=backend, **options)

        yield f"cross_entropy, {name}", with_gradients(call, logits)
    yield (
        "cross_entropy, weight",
        with_gradients(
            lambda x: neglog.cross_entropy(x, target, weight, label_smoothing=0.1, backend=backend),
            logits,
        ),
    )
    yield (
        "cross_entropy, probabilities",
        with_gradients(
            lambda x, q: neglog.cross_entropy(x, q, weight, label_smoothing=0.1, backend=backend),
            logits, probabilities,
        ),
    )  # fmt: skip
    images = (3 * normal(3, 19, 8, 5, seed=5)).to(dtype)
    labels = (normal(3, 8, 5, seed=6).abs() * 1e6).long() % 19
    yield (
        "cross_entropy, images",
        with_gradients(lambda x: neglog.cross_entropy(x, labels, backend=backend), images),
    )
    mask = normal(rows, seed=7) > 0.5
    for name in ("mean", "none", "in place", "stats"):

        def masked(x: Any, options: dict = NLL_OPTIONS[name]) -> Any:
            return neglog.masked_cross_entropy(x, target % vocab, mask, backend=backend, **options)

        yield f"masked_cross_entropy, {name}", with_gradients(masked, logits)
    yield (
        "masked_cross_entropy, probabilities",
        with_gradients(
            lambda x: neglog.masked_cross_entropy(x, probabilities, mask, backend=backend), logits
        ),
    )
    hidden, head, bias = (
        (0.3 * normal(*shape, seed=8 + len(shape))).to(dtype)
        for shape in ((2, 90, 24), (vocab, 24), (vocab,))
    )
    index = (normal(2, 90, seed=12).abs() * 1e6).long() % vocab
    index[:, ::7] = -100
    for name, options in LINEAR_OPTIONS.items():

        def linear(x: Any, w: Any, b: Any, options: dict = options) -> Any:
            return neglog.linear_cross_entropy(
                x, w, index, linear_bias=b, backend=backend, **options
            )

        yield f"linear_cross_entropy, {name}", with_gradients(linear, hidden, head, bias)
    yield (
        "linear_cross_entropy, autocast",
        with_gradients(
            lambda x, w: _autocast(
                lambda: neglog.linear_cross_entropy(x, w, index, backend=backend)
            ),
            hidden.float(), head.float(),
        ),
    )  # fmt: skip
    assert torch.get_num_threads() == 1


def _autocast(call: Callable[[], Any]) -> Any:
    with _torch().autocast("cpu", dtype=_torch().bfloat16):
        return call()


def pair_calls(backend: str, dtype: Any) -> Iterator[tuple[str, str]]:
    import neglog

    torch = _torch()
    rows, features = 230, 24
    first, second = (normal(rows, features, seed=20 + i).to(dtype) for i in range(2))
    further = normal(75, features, seed=22).to(dtype)
    own = normal(rows, 3, features, seed=23).to(dtype)
    ids, scale = torch.arange(rows) % 50, torch.tensor(12.0)
    each = torch.linspace(0.05, 0.5, rows)
    unit_first, unit_second = (torch.nn.functional.normalize(x, dim=1) for x in (first, second))
    forms: dict[str, tuple[Callable[..., Any], tuple]] = {
        "info_nce": (lambda a, b, **o: neglog.info_nce(a, b, **o), (first, second)),
        "info_nce, symmetric": (
            lambda a, b, t, **o: neglog.info_nce(a, b, temperature=t, symmetric=True, **o),
            (first, second, torch.tensor(0.07)),
        ),
        "info_nce, exclude, smoothing of columns": (
            lambda a, b, **o: neglog.info_nce(
                a, b, exclude=ids, symmetric=True, return_stats=True, **o
            ),
            (first, second),
        ),
        "info_nce, smoothing": (
            lambda a, b, **o: neglog.info_nce(a, b, label_smoothing=0.1, symmetric=True, **o),
            (first, second),
        ),
        "info_nce, temperature by row": (
            lambda a, b, t, **o: neglog.info_nce(
                a, b, temperature=t, symmetric=True, reduction="none", **o
            ),
            (first, second, each),
        ),
        "info_nce, queue": (
            lambda a, b, c, **o: neglog.info_nce(a, b, c, return_stats=True, **o),
            (first, second, further),
        ),
        "info_nce, in batch": (
            lambda a, b, c, **o: neglog.info_nce(
                a, b, c, negative_mode="in_batch", hard_negative_weight=0.5, **o
            ),
            (first, second, further),
        ),
        "info_nce, paired": (
            lambda a, b, c, **o: neglog.info_nce(a, b, c, negative_mode="paired", **o),
            (first, second, own),
        ),
        "clip_loss": (
            lambda a, b, s, **o: neglog.clip_loss(a, b, s, **o),
            (unit_first, unit_second, scale),
        ),
        "siglip_loss": (
            lambda a, b, s, t, **o: neglog.siglip_loss(a, b, s, t, **o),
            (unit_first, unit_second, scale, torch.tensor(-3.0)),
        ),
        "nt_xent": (lambda a, b, **o: neglog.nt_xent(a, b, **o), (first, second)),
        "nt_xent, none": (
            lambda a, b, **o: neglog.nt_xent(a, b, reduction="none", **o),
            (first, second),
        ),
        "dcl": (lambda a, b, **o: neglog.dcl(a, b, **o), (first, second)),
        "sup_con": (lambda a, **o: neglog.sup_con(a, ids, **o), (first,)),
    }
    for name, (call, inputs) in forms.items():
        for kept, options in (("kept", KEPT), ("made again", AGAIN)):

            def run(*given: Any, call: Any = call, options: Any = options) -> Any:
                return call(*given, options=options, backend=backend)

            yield f"{name}, {kept}", with_gradients(run, *inputs)


def cpu_calls(backend: str) -> dict[str, str]:
    torch = _torch()
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for calls in (nll_calls, pair_calls):
            if calls is pair_calls and dtype == torch.float16:
                continue  # of 16 bits one type tells all that is not the rounding
            for name, value in calls(backend, dtype):
                found[f"{name}, {dtype}"] = value
    return found


# Ops of CUDA, emulated


def cuda_calls() -> dict[str, str]:
    torch = _torch()
    from tests.support import bits_of_cuda

    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name, values in bits_of_cuda.calls(dtype):
            found[f"{name}, {dtype}"] = digest(values)
    return found


def child(kind: str) -> dict[str, str]:
    torch = _torch()
    torch.set_num_threads(1)
    return cuda_calls() if kind == "cuda" else cpu_calls(kind)


def everything() -> dict[str, str]:
    """Each build's calls in a process of its own, as NEGLOG_ISA is read once."""
    from neglog import kernels

    builds = [(build.name, "cython") for build in kernels.isa_builds() if build.usable]
    found = {}
    for label, kind in [*builds, ("numba", "numba"), ("cuda", "cuda")]:
        environment = {**os.environ, **FIXED}
        if kind == "cython":
            environment["NEGLOG_ISA"] = label
        command = [sys.executable, "-m", "tests.support.bits", "--child", kind]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        lines = done.stdout.decode().splitlines()
        found |= {f"{label}: {name}": value for name, value in json.loads(lines[-1]).items()}
    return found


def main() -> int:
    if sys.argv[1] == "--child":
        print(json.dumps(child(sys.argv[2])))
        return 0
    out, *others = map(Path, sys.argv[1:])
    found = everything()
    out.write_text(json.dumps(found, indent=0, sort_keys=True))
    print(f"{len(found)} calls")
    for other in others:
        before = json.loads(other.read_text())
        differ = sorted(name for name in before if found.get(name) != before[name])
        print(f"{len(before) - len(differ)} of {len(before)} calls of {other} have equal bits")
        for name in differ:
            print(f"  differs: {name}")
        if differ:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
