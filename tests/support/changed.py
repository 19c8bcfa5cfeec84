"""Run the tests of what changed since main, up to the first failure: see `make fast`.

    python -m tests.support.changed [BASE] [--list]

tests/ has the folders of the tree, so the tests of a file are found by its name: the nearest of
tests/ops/nll/test_cpu*.py, tests/ops/test_nll*.py, tests/test_ops*.py for ops/nll/cpu.py. What has
no such name runs CORE. `make test` runs everything, and decides.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
# One cheap file for each thing that every call goes through.
CORE = [
    "tests/losses/test_any_size.py",
    "tests/ops/test_define.py",
    "tests/ops/test_nll_eager.py",
    "tests/test_checks.py",
    "tests/test_route.py",
]
CONTRASTIVE = ["tests/losses/test_contrastive.py", "tests/losses/test_info_nce.py"]
# What is tested under other names too.
ALSO = {
    "losses/_pairs": CONTRASTIVE,
    "losses/_result": ["tests/losses/test_masked_cross_entropy.py", *CORE],
    "losses/_rows": ["tests/losses/test_cross_entropy.py", *CORE],
    "losses/clip": [*CONTRASTIVE[:1], "tests/distributed"],
    "losses/cross_entropy": ["tests/losses/test_masked_cross_entropy.py", *CORE],
    "losses/info_nce": CONTRASTIVE,
    "losses/linear_cross_entropy": ["tests/ops/test_linear_nll.py", *CORE],
    "losses/nt_xent": CONTRASTIVE[:1],
    "losses/sup_con": CONTRASTIVE[:1],
    "grad_cache": ["tests/distributed"],
    "distributed/data_parallel": ["tests/test_grad_cache.py"],
    "ops/define": ["tests/ops/test_nll.py"],
    "ops/memory": ["tests/ops/test_nll.py", "tests/ops/test_linear_nll.py"],
    "tiles/plan": ["tests/ops/test_linear_nll.py"],
}
FOLDERS_THAT_ARE_BACKENDS = {"cython", "numba", "numpy"}
DOCUMENTS = ("docs/", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def changed_files(base: str) -> list[str]:
    """Of the working tree against the merge base with `base`, and what git does not know yet."""

    def git(*arguments: str) -> list[str]:
        made = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return made.stdout.splitlines()

    (fork,) = git("merge-base", base, "HEAD")
    return [
        *git("diff", "--name-only", "--no-renames", fork),
        *git("ls-files", "--others", "--exclude-standard"),
    ]


def users_of(helper: str) -> set[str]:
    """The test files that import a helper of tests/support, or one that does."""
    line = re.compile(rf"^from tests\.support(\.{helper}\b| import .*\b{helper}\b)", re.MULTILINE)
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if not line.search(path.read_text()):
            continue
        is_test = path.name.startswith("test_")
        found |= {path.relative_to(ROOT).as_posix()} if is_test else users_of(path.stem)
    return found


def named_like(parts: tuple[str, ...]) -> list[str]:
    """The test files nearest to a file by name."""
    *folders, name = (part for part in parts if part not in FOLDERS_THAT_ARE_BACKENDS)
    while True:
        found = sorted((ROOT / "tests").joinpath(*folders).glob(f"test_{name.strip('_')}*.py"))
        if found or not folders:
            return [path.relative_to(ROOT).as_posix() for path in found]
        name = folders.pop()


def find_tests(file: str) -> list[str]:
    """What to run for one changed file."""
    path = PurePosixPath(file)
    parts = path.with_suffix("").parts
    if file.startswith(DOCUMENTS):
        return ["tests/docs"]
    if parts[0] == "tests":
        if path.name.startswith("test_"):
            return [file] if (ROOT / file).exists() else []
        return sorted(users_of(path.stem)) if parts[1] == "support" else CORE
    if path.suffix not in (".py", ".pyi", ".pyx", ".pxd", ".hpp", ".cu", ".cuh", ".sh"):
        return CORE
    if parts[0] == "kernels" and path.suffix in (".hpp", ".pxd"):
        return ["tests/kernels"]  # a header of all kernels, and not its own tests alone
    if parts[:2] == ("python", "neglog"):
        parts = parts[2:]
    named = named_like(parts) + ALSO.get("/".join(parts), [])
    if not named and parts[0] in ("kernels", "csrc", "distributed"):
        return [f"tests/{parts[0]}"]
    return named or CORE


def chosen(files: Iterable[str]) -> list[str]:
    """Each test file once; nothing changed is CORE."""
    found = {test for file in files for test in find_tests(file) if (ROOT / test).exists()}
    return sorted(found) or CORE


def main(arguments: list[str]) -> int:
    bases = [argument for argument in arguments if not argument.startswith("-")]
    files = changed_files(*(bases or ["main"]))
    command = [sys.executable, "-m", "pytest", "-x", *chosen(files)]
    if files and not any("numba" in file for file in files):
        command += ["-k", "not numba"]  # which compiles for longer than all the rest takes
    print(" ".join(command[1:]), flush=True)
    return 0 if "--list" in arguments else subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
