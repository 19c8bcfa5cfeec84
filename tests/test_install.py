"""Installs from the sources alone: where no kernel can be compiled, and with those of CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import code_blocks

ROOT = Path(__file__).parent.parent
README = code_blocks.read(ROOT / "README.md")
SOURCES = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels",
    "python", "bench", "examples",
)  # fmt: skip
# An editable install of the tree would lend its compiled modules to the one that has none.
CODE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import numpy, neglog
from neglog import kernels
print(neglog.__file__)
import neglog.bench.run, neglog.examples.demo
print(neglog.bench.run.__file__, neglog.examples.demo.__file__)
print(kernels.isa_level(), kernels.available("cython").why)
for _ in range(2):
    print(kernels.nll_forward(numpy.zeros((2, 4), "f"), [0, 1]).loss)
"""


def install(scratch, target, environment):
    """From a copy of the sources, without anything that was built."""
    tree = scratch / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "x86_64_*")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps",
               "--target", str(target), str(tree)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def modules_of(package):
    """Those of the package and of all folders in it; kernels/ and the like are links."""
    return {path.relative_to(package) for path in package.rglob("*.py")}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NEGLOG_COMPILE": "0", "NEGLOG_CUDA": "0"}, ""),
        (
            {"NEGLOG_COMPILE": "", "NEGLOG_CUDA": "0", "CC": "false", "CXX": "false"},
            "neglog: the kernels were not compiled",
        ),
    ],
    ids=["not asked", "no compiler"],
)
def test_install_without_a_compiler(tmp_path, environment, said):
    target = tmp_path / "site"
    installed = install(tmp_path, target, environment)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert said in installed.stdout + installed.stderr
    assert not list(target.rglob("*.so"))
    assert (target / "neglog" / "py.typed").exists()

    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    where, beside, level, *losses = ran.stdout.splitlines()
    assert where.startswith(str(target))
    assert [file.startswith(str(target / "neglog")) for file in beside.split()] == [True, True]
    # Numbers and scripts for developers stay in the repository.
    assert not list(target.rglob("results"))
    assert not list(target.rglob("tools"))
    assert modules_of(target / "neglog") >= modules_of(ROOT / "python" / "neglog")
    assert level == "None not built: neglog was installed without a C++ compiler"
    assert losses == ["[1.3862944 1.3862944]"] * 2
    assert ran.stderr.count("no compiled kernels can run here, so Numba compiles") == 1


BUILT = ("*.pyc", "*.nbc", "*.nbi", "*.so")


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory) -> set[str]:
    """The files of an sdist, as setuptools lists them before it packs them."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    environment = os.environ | {"NEGLOG_COMPILE": "0", "NEGLOG_CUDA": "0"}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    (listed,) = folder.glob("*/SOURCES.txt")
    return set(listed.read_text().splitlines())


def test_the_sdist_has_all_that_its_tests_read(source_distribution):
    """conftest and support, without which they are not collected, and what they run and emulate."""
    for folder in ("tests", "bench", "csrc", "docs", "examples", "kernels"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted = {str(x.relative_to(ROOT)) for x in files if not any(map(x.match, BUILT))}
        assert wanted, folder
        assert wanted <= source_distribution
    assert {"Makefile", "setup.py", "python/neglog/__init__.pyi"} <= source_distribution


def test_the_sdist_has_nothing_that_was_built(source_distribution):
    assert not [x for x in source_distribution if any(map(Path(x).match, BUILT))]
    assert not [x for x in source_distribution if x.startswith(("build/", ".venv/"))]


def test_the_links_of_the_readme_lead_somewhere_in_the_sdist(source_distribution):
    links = {target.partition("#")[0] for _, target in code_blocks.links(README)} - {""}
    assert "docs/losses.md" in links
    folders = {str(folder) for file in source_distribution for folder in Path(file).parents}
    assert links <= source_distribution | folders


def test_a_failing_compiler_is_an_error_where_compiling_is_demanded(tmp_path):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"),
             "--build-temp", str(tmp_path / "temp")]  # fmt: skip
    demanded = {"NEGLOG_COMPILE": "1", "CC": "false", "CXX": "false"}
    failed = subprocess.run(
        build, capture_output=True, text=True, cwd=ROOT, env=os.environ | demanded
    )
    assert failed.returncode != 0
    assert "error: " in failed.stderr
    assert "false" in failed.stderr


NVCC = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo made by the test >"$2"; fi
    shift
done
"""


def nvcc(folder, text):
    path = folder / "nvcc"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_cuda_is_installed_where_it_is_demanded(tmp_path):
    """With an nvcc that writes its outputs and no more: the sources are compiled by `make cuda`."""
    demanded = {"NEGLOG_COMPILE": "0", "NEGLOG_CUDA": "1", "NVCC": nvcc(tmp_path, NVCC)}
    installed = install(tmp_path, tmp_path / "site", demanded)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (library,) = (tmp_path / "site").rglob("*.so")
    assert library == tmp_path / "site" / "neglog" / "neglog_cuda.so"
    assert library.read_text() == "made by the test\n"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NEGLOG_CUDA": "1", "NVCC": "no-such-nvcc"}, "NEGLOG_CUDA=1: nvcc is not found"),
        ({"NEGLOG_CUDA": "yes"}, "NEGLOG_CUDA: expected 0, 1 or nothing, got 'yes'"),
        ({"NEGLOG_CUDA": "1"}, "NEGLOG_CUDA=1: csrc/compile.sh failed"),
    ],
    ids=["no nvcc", "no such value", "failing nvcc"],
)
def test_cuda_demanded_and_impossible_is_an_error(tmp_path, environment, said):
    failing = {"NVCC": nvcc(tmp_path, "#!/bin/sh\nexit 1\n")}
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"),
             "--build-temp", str(tmp_path / "temp")]  # fmt: skip
    failed = subprocess.run(
        build, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"NEGLOG_COMPILE": "0"} | failing | environment,
    )  # fmt: skip
    assert failed.returncode != 0
    assert said in failed.stderr
