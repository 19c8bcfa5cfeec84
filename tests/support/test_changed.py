"""Which tests `make fast` runs for a changed file."""

import pytest

from tests.support.changed import ALSO, CORE, ROOT, chosen, find_tests, named_like

# The rules in turn: the nearest name, what is tested under other names too, a folder, its users,
# and what has no name.
RULES = {
    "python/neglog/ops/nll/cpu.py": "tests/ops/test_nll.py",
    "python/neglog/nn.py": "tests/test_nn.py",
    "python/neglog/losses/_pairs.py": "tests/losses/test_contrastive.py",
    "python/neglog/losses/clip.py": "tests/distributed",
    "kernels/numba/pairs.py": "tests/kernels/test_pairs.py",
    "kernels/cython/block.hpp": "tests/kernels",
    "csrc/pairs/cell.cuh": "tests/csrc/test_pairs_cells.py",
    "csrc/common/cluster.cuh": "tests/csrc",
    "tests/support/emulated.py": "tests/csrc/test_nll.py",
    "tests/test_nn.py": "tests/test_nn.py",
    "docs/losses.md": "tests/docs",
    "setup.py": CORE[0],
}


@pytest.mark.parametrize(("file", "test"), RULES.items(), ids=RULES.keys())
def test_a_file_finds_its_tests(file, test):
    assert (ROOT / file).exists()
    assert test in chosen([file])


def test_every_path_of_the_tables_exists():
    paths = {*CORE, *(path for paths in ALSO.values() for path in paths)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for file in ALSO:
        assert (ROOT / "python/neglog" / f"{file}.py").exists()


def test_nothing_changed_runs_the_core():
    assert chosen([]) == CORE
    assert find_tests("tests/test_that_was_removed.py") == []
    assert named_like(("no_such_file",)) == []
