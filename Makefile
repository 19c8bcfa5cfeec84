# Every target sets up what it needs: a virtual environment, torch, the compiled kernels.
#
#   make demo | test | fast | coverage | lint | bench | cuda | clean
#
# test       everything                   fast    the tests of what changed since main
# coverage   test, and which lines and branches no test reaches
#
# PYTHON   the interpreter to begin with            make test PYTHON=python3.12
# TORCH    what pip is asked for as torch           make demo TORCH=torch==2.10.0
# BASE     what `fast` compares with                make fast BASE=HEAD

PYTHON ?= python3
TORCH ?= torch==2.13.0
BASE ?= main
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(wildcard kernels/cython/*.p* kernels/cython/*.hpp)

.PHONY: demo test fast coverage lint bench cuda examples clean

demo: $(READY)
	$(BIN)/python -m neglog demo

# Two at a time; without the variable the threads of each would spin while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(READY)
	$(PYTEST)

fast: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.support.changed $(BASE)

coverage: $(READY)
	$(PYTEST) --cov --cov-report=term-missing

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror csrc/*/*.cu csrc/*/*.cuh csrc/*/*.hpp

bench: $(READY)
	$(BIN)/python -m neglog bench cross_entropy

# Compiles and links; says so and goes on where there is no nvcc.
cuda: $(READY)
	PYTHON=$(BIN)/python csrc/compile.sh --strict --if-available

examples: $(READY)
	$(BIN)/python examples/numpy_only.py
	$(BIN)/python examples/train_gpt.py

# torch first and alone, in the version it is asked for; then no build environment of its own for
# neglog, which would fetch a second torch. open_clip without what it needs: PyPI's torchvision is for
# other builds of torch, and the tests read open_clip's losses alone.
$(READY): setup.py pyproject.toml $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77' 'cython>=3.1' numpy
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'open_clip_torch>=3'
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find kernels -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
