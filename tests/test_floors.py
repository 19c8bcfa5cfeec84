"""A floor of the house imports only from floors below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. Modules on one line are one floor and may know each other.
FLOORS = (
    ("kernels.jit.numerics", "kernels.memory"),
    ("kernels.jit.pairs",),
    ("kernels.jit.nll", "kernels.jit.pairs"),
    ("kernels",),
    ("kernels.arrays",),
    ("kernels.pair_arrays",),
    ("reference",),
    ("cuda", "tiling"),
    ("dispatch", "validation", "matmul"),
    ("ops.nll", "ops.nll_composite"),
    ("ops.nll_autograd", "ops.linear_nll", "ops.pairs_tile"),
    ("ops.linear_nll_cuda", "ops.pairs"),
    ("ops.linear_nll_autograd", "ops.pairs_composite"),
    ("ops.pairs_autograd",),
    ("ops.siglip",),
    ("functional",),
    ("linear", "comparison", "grad_cache", "distributed"),
    ("contrastive",),
    ("nn", "patch"),
    ("benchmark",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
# Two that look up, by name, when they are first asked for: the lazy faces of the packages.
LAZY = {"": {"dispatch", "kernels", "nn", "reference", "functional", "linear", "patch",
             "contrastive", "grad_cache"},
        "kernels": {"kernels.arrays", "kernels.pair_arrays"}}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((ROOT / "kernels", "kernels"), (ROOT / "python" / "neglog", "")):
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part and part != "__init__")] = path
    return found


def floor_of(module: str) -> int:
    """The floor of the module, or of the package it lies in."""
    for number, floor in enumerate(FLOORS):
        if module in floor:
            return number
    assert "." in module, f"{module} is on no floor: add it to FLOORS"
    return floor_of(module.rpartition(".")[0])


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of neglog that a file imports anywhere in it, without the package's name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "neglog":
            base = (node.module or "").removeprefix("neglog").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                names.add(inner if inner in known else base)
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("neglog").removeprefix(".")
                      for alias in node.names if alias.name.split(".")[0] == "neglog"}  # fmt: skip
    return names - {""}


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_below(module):
    for name in imported(MODULES[module], set(MODULES)) - LAZY.get(module, set()) - {module}:
        same_package = module.split(".")[0] == name.split(".")[0] in ("benchmark", "demo")
        assert same_package or floor_of(name) < floor_of(module), f"{module} imports {name}"


def test_the_ground_floor_knows_no_torch():
    for module, path in MODULES.items():
        if module.split(".")[0] in ("kernels", "reference"):
            assert "import torch" not in path.read_text(), module
