"""README and docs say what runs: their Python is run, their commands exist, their links lead there.

A stranger copies a block and runs it. So a block that no longer runs is a fault of the page.
"""

import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from neglog.cli import parser
from tests.support import code_blocks
from tests.support.code_blocks import ROOT, Page

PAGES = [code_blocks.read(path) for path in code_blocks.PAGES]
# A page for each case: its blocks share one namespace, as in a reader's own session.
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in page.blocks)]
LANGUAGES = {"python", "sh", "text"}


def name(page: Page) -> str:
    return page.name


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_runs(page, capsys):
    """Blocks first, in order; then the calls in tables, which use the names that blocks define."""
    torch.manual_seed(0)
    namespace = code_blocks.run_python(page)
    for line, call in code_blocks.calls(page):
        try:
            made = eval(call, namespace)
        except Exception as error:
            raise AssertionError(f"{page.name}:{line}: {call}") from error
        if hasattr(made, "undo"):  # patch_torch, which lasts until then
            made.undo()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_known_language(page):
    """A block of another one would be checked by nothing."""
    unknown = [block for block in page.blocks if block.language not in LANGUAGES]
    assert not unknown


# Commands


def make(arguments: list[str]) -> str | None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [argument for argument in arguments if "=" not in argument]
    missing = [target for target in wanted if target not in targets]
    return f"no target {missing[0]!r} in the Makefile" if missing else None


def neglog(arguments: list[str]) -> str | None:
    try:
        parser().parse_args(arguments)
    except SystemExit as refused:
        return "the parser refuses the arguments" if refused.code else None
    return None


def pip(arguments: list[str]) -> str | None:
    """Of `install`: the extras that are asked for."""
    if arguments[:1] != ["install"]:
        return "expected pip install"
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = re.findall(r"^([\w-]+) = ", section, re.MULTILINE)
    extras = [re.findall(r"\[(.*)\]", argument) for argument in arguments]
    asked = [extra for found in extras for extra in ",".join(found).split(",") if extra]
    missing = [extra for extra in asked if extra not in known]
    return f"no extra {missing[0]!r} in pyproject.toml" if missing else None


def python(arguments: list[str]) -> str | None:
    if arguments[:1] != ["-m"]:
        return file(arguments[0], ".py")
    modules: dict[str, Callable[[list[str]], str | None]] = {
        "neglog": neglog, "pip": pip, "venv": anything, "pytest": pytest_paths,
    }  # fmt: skip
    module, *rest = arguments[1:]
    if module in modules:
        return modules[module](rest)
    return None if find_spec(module) else f"unknown module {module!r}"


def pytest_paths(arguments: list[str]) -> str | None:
    paths = [argument for argument in arguments if not argument.startswith("-")]
    return next((problem for path in paths if (problem := file(path, ""))), None)


def file(path: str, suffix: str) -> str | None:
    """A file of the repository, or of the reader where the name stands for any: FILE."""
    if path.isupper():
        return None
    return None if path.endswith(suffix) and (ROOT / path).exists() else f"no file {path!r}"


def anything(arguments: list[str]) -> str | None:
    return None


KNOWN = {
    "make": make, "neglog": neglog, "pip": pip, "python": python, "python3": python,
    "git": anything, "cd": anything, "source": anything,
}  # fmt: skip


def problem(command: str) -> str | None:
    """Why a command cannot be one, or None."""
    for part in re.split(r"\s*(?:&&|;)\s*", command):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if not words:
            continue
        program, *arguments = words
        if "/" in program and not program.startswith(".venv/bin/"):
            found = file(program, "")
        else:
            program = Path(program).name
            found = KNOWN[program](arguments) if program in KNOWN else f"unknown {program!r}"
        if found:
            return found
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    found = [(line, command, problem(command)) for line, command in code_blocks.commands(page)]
    assert not [
        f"{page.name}:{line}: {command}: {wrong}" for line, command, wrong in found if wrong
    ]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make tset", "no target 'tset'"),
        ("python -m neglog bench cross_entropy --row 3 --dtype int8", "the parser refuses"),
        ("pip install '.[gpu]'", "no extra 'gpu'"),
        ("python bench/nothing.py", "no file"),
        ("rm -r kernels", "unknown 'rm'"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, wrong):
    assert wrong in problem(command)


# Links


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for line, target in code_blocks.links(page):
        path, _, heading = target.partition("#")
        there = (page.path.parent / path).resolve() if path else page.path
        if not there.exists():
            broken.append(f"{page.name}:{line}: {target}: no such file")
        elif heading and heading not in code_blocks.anchors(code_blocks.read(there)):
            broken.append(f"{page.name}:{line}: {target}: no such heading")
    assert not broken
