"""What a Markdown page holds that can be checked: code, commands, calls in tables, links, headings.

A page is read line by line. A fenced block is code; everything else is prose. A comment

    <!-- setup:
    import torch
    -->

is Python that the page's blocks need and the reader does not see.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

SETUP = "<!-- setup:"
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")


class Block(NamedTuple):
    """Code between two fences, or in a setup comment; `line` is the first line of it, from 1."""

    language: str
    line: int
    text: str


class Page(NamedTuple):
    """The blocks of a page in order, and the lines between them, (number, text) each."""

    path: Path
    blocks: list[Block]
    prose: list[tuple[int, str]]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


def read(path: Path) -> Page:
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in lines:
        if line.startswith("```"):
            blocks.append(_block(line[3:].strip(), number + 1, lines, "```"))
        elif line.startswith(SETUP):
            blocks.append(_block("python", number + 1, lines, "-->"))
        else:
            prose.append((number, line))
    return Page(path, blocks, prose)


def _block(language: str, first: int, lines: Iterator[tuple[int, str]], end: str) -> Block:
    text = []
    for _, line in lines:
        if line.startswith(end):
            return Block(language, first, "\n".join(text) + "\n")
        text.append(line)
    raise ValueError(f"line {first}: expected {end!r} after it, got the end of the page")


def run_python(page: Page) -> dict[str, Any]:
    """Run a page's Python, in order, in one namespace, which is returned.

    An error's traceback names the page and the line.
    """
    namespace: dict[str, Any] = {"__name__": page.name}
    for block in page.blocks:
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, page.name, "exec"), namespace)
    return namespace


def calls(page: Page) -> list[tuple[int, str]]:
    """The calls of neglog that a table shows, `neglog.f(x)`: line and expression."""
    found = []
    for number, line in page.prose:
        if line.startswith("|"):
            spans = (match.group(1) for match in CODE_SPAN.finditer(line))
            found += [(number, span) for span in spans if _is_call(span)]
    return found


def _is_call(span: str) -> bool:
    if not span.startswith("neglog.") or not span.endswith(")"):
        return False
    return isinstance(ast.parse(span, mode="eval").body, ast.Call)


def commands(page: Page) -> list[tuple[int, str]]:
    """What a page tells a reader to type in a shell: line and command, without its comment.

    All lines of ```sh blocks, and in the prose the code spans that begin as a command does.
    """
    found = []
    for block in page.blocks:
        if block.language == "sh":
            typed = enumerate(block.text.splitlines(), block.line)
            found += [(number, command) for number, line in typed if (command := _command(line))]
    for number, line in page.prose:
        spans = (match.group(1) for match in CODE_SPAN.finditer(line))
        starts = ("make ", "python ", "neglog ", "pip ")
        found += [(number, span) for span in spans if span.startswith(starts)]
    return found


def _command(line: str) -> str:
    return re.sub(r"(^|\s+)#.*", "", line).strip()


def links(page: Page) -> list[tuple[int, str]]:
    """Links and pictures within the repository: line and target."""
    found = []
    for number, line in page.prose:
        for match in LINK.finditer(line):
            target = match.group(1) or match.group(2)
            if not re.match(r"[a-z]+:", target):
                found.append((number, target))
    return found


def anchors(page: Page) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    made = set()
    for _, line in page.prose:
        if match := re.match(r"#{1,6} +(.*)", line):
            name = re.sub(r"[^\w\- ]", "", match.group(1).strip().lower()).replace(" ", "-")
            made.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return made


def tables(page: Page) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Each table of a page: the names of its columns, and its rows."""
    rows: list[list[str]] = []
    for _, line in [*page.prose, (0, "")]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield rows[0], rows[2:]
            rows = []
