"""torch's switches for float32 products on the CPU: neglog multiplies as torch.mm does.

Which products a CPU has is its own matter: most have none in bfloat16 for float32 numbers, and then
nothing changes but the library. What oneDNN was asked for it says itself.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

import neglog
from neglog.tiles import gemm
from tests.tiles.test_gemm import LOSSES, draw, error

SETTINGS = ["ieee", "tf32", "bf16"]


@pytest.fixture
def switch():
    """Sets the precision of float32 products; what it was comes back."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield lambda precision: setattr(matmul, "fp32_precision", precision)
    matmul.fp32_precision = before


ALL_PRODUCTS = """
import sys
import torch, neglog
from neglog.tiles import gemm

precision, library = sys.argv[1:]
torch.backends.mkldnn.matmul.fp32_precision = precision
gemm.SMALL_PRODUCT = 0
for name in ("linear", "add_outer"):
    chosen = getattr(gemm, f"{name}_by_{library}")
    setattr(gemm, f"fastest_{name}", lambda chosen=chosen: chosen)
x, w = torch.randn(64, 32), torch.randn(128, 32)
print("torch.mm", flush=True)
torch.mm(x, w.t())
leaves = [part.requires_grad_() for part in (x, w)]
for name, loss in {
    "linear_cross_entropy": lambda: neglog.linear_cross_entropy(x, w, torch.arange(64)),
    "clip_loss": lambda: neglog.clip_loss(x, w[:64], 1.0),
    "siglip_loss": lambda: neglog.siglip_loss(x, w[:64], 1.0, 0.0),
    "nt_xent": lambda: neglog.nt_xent(x, w[:64]),
    "info_nce": lambda: neglog.info_nce(x, w[:64]),
}.items():
    print(name, flush=True)
    loss().backward()
"""


def asked_of_onednn(precision, library):
    """By what made them, the precisions of the float32 products that oneDNN made."""
    done = subprocess.run(
        [sys.executable, "-c", ALL_PRODUCTS, precision, library],
        env=os.environ | {"ONEDNN_VERBOSE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    asked = {}
    for line in done.stdout.splitlines():
        if not line.startswith("onednn_verbose"):
            asked[line] = made = []
        elif re.search(r"exec,cpu,(matmul|inner_product),.*src:f32", line):
            fpmath = re.search(r"attr-fpmath:(\w+)", line)
            made.append(fpmath.group(1) if fpmath else "ieee")
    return asked


# Each library, whichever is the faster here.
@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize("precision", SETTINGS)
def test_onednn_is_asked_for_what_torch_mm_asks(precision, library):
    asked = asked_of_onednn(precision, library)
    of_torch, *_ = asked.pop("torch.mm") or ["ieee"]
    assert of_torch in (precision, "ieee")
    assert len(asked) == 5
    for name, made in asked.items():
        products = 2 if name == "nt_xent" else 3  # half a matrix
        # torch.mm leaves a product in full precision to BLAS.
        fewest = products if of_torch != "ieee" else (products - 1) * (library == "onednn")
        assert len(made) >= fewest, name
        assert set(made) <= {of_torch}, name


# The error of torch.mm's own formula under the same switch, and of both without one.
@pytest.mark.parametrize("precision", SETTINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_errors_are_those_of_torch_mm(name, precision, switch):
    switch(precision)
    ours, theirs, shapes = LOSSES[name]
    inputs = [x.requires_grad_() for x in draw(*shapes)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, mine, its = (
        (loss, *torch.autograd.grad(loss, leaves))
        for loss, leaves in (
            (theirs(*exact), exact), (ours(*inputs), inputs), (theirs(*inputs), inputs)
        )
    )  # fmt: skip
    for exact, one, other in zip(truth, mine, its, strict=True):
        lucky = torch.finfo(torch.float32).eps if exact.dim() == 0 else 0  # one number by chance
        assert error(one, exact) <= 1.2 * error(other, exact) + 1e-6 + lucky


def test_nothing_measured_under_one_setting_is_used_under_another(switch, monkeypatch):
    probes = []
    for name in ("_probe_linear", "_probe_add_outer", "_probe_float32"):
        monkeypatch.setattr(gemm, name, lambda *a, name=name: probes.append((name, *a)))
    for precision in (*SETTINGS, *SETTINGS):
        switch(precision)
        gemm.fastest_linear(), gemm.fastest_add_outer(), gemm.float32_is_faster(torch.bfloat16)
    assert len(probes) == 3 * len(SETTINGS)


def test_without_onednn_nothing_asks_it(monkeypatch):
    monkeypatch.setattr(gemm, "SMALL_PRODUCT", 0)
    (x,), out = draw((3, 4)), torch.empty(3, 5)
    assert gemm._may_use_onednn(x, out)
    torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.enabled = False
    try:
        assert not gemm._may_use_onednn(x, out)
    finally:
        torch._C._set_mkldnn_enabled(True)


# float16 has 11 digits, a product in bfloat16 keeps 8: the switch speaks of float32 alone.
def test_float16_is_not_multiplied_in_bfloat16(switch, monkeypatch):
    monkeypatch.setattr(gemm, "_probe_float32", lambda dtype: True)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: dtypes.append(a.dtype) or out)
    dtypes = []
    x, w = draw((70, 33), (33, 50), dtype=torch.float16)
    for precision, dtype in (("ieee", torch.float32), ("bf16", torch.float64)):
        switch(precision)
        gemm.add_product(x, w, torch.empty(70, 50), True)
        assert dtypes.pop() == dtype
        assert gemm.tile_dtype(x) == (torch.float32 if precision == "ieee" else torch.float16)


def test_a_loss_leaves_the_switch_as_it_was(switch):
    for precision in SETTINGS:
        switch(precision)
        x, w = draw((600, 64), (2000, 64))
        neglog.linear_cross_entropy(x.requires_grad_(), w, torch.arange(600)).backward()
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
