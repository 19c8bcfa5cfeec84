"""Tables and the console that the commands print on, and the packages they need to do it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import Refusal

if TYPE_CHECKING:
    from rich.console import Console

# A file or a pipe has no width: no line is folded there.
NO_TERMINAL = 10_000


def need(name: str, purpose: str, extra: str) -> ModuleType:
    """The module `name`; if it is not installed, a refusal that says which extra brings it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise Refusal(f"{purpose} needs {package}: pip install 'neglog[{extra}]'") from error


def console() -> Console:
    """rich's console. Where its output is no terminal, each line is as long as its text."""
    made: Console = importlib.import_module("rich.console").Console(highlight=False)
    if not made.is_terminal:
        made.width = NO_TERMINAL
    return made


class Table(NamedTuple):
    """Rows of text. emphasis: by number of the row, "bold" or "dim"."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    emphasis: dict[int, str] = {}  # noqa: RUF012 - never written


def show(screen: Console, table: Table) -> None:
    """On a terminal with rich's styles, elsewhere as plain lines."""
    if screen.is_terminal:
        screen.print(_styled(table))
        return
    for line in ("", *plain(table), ""):
        screen.print(line, markup=False)


def _styled(table: Table) -> Any:
    """For rich to print: the first column to the left, the others to the right."""
    box = importlib.import_module("rich.box").SIMPLE_HEAD
    made: Any = importlib.import_module("rich.table").Table(
        title=table.title, box=box, title_justify="left", title_style="bold", pad_edge=False
    )
    for index, column in enumerate(table.columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for index, row in enumerate(table.rows):
        made.add_row(*row, style=table.emphasis.get(index))
    return made


def plain(table: Table) -> Iterator[str]:
    """The table as lines of text, which need no rich."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    yield table.title
    for line in lines:
        first, *others = (cell for cell in line)
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def duration(seconds: float) -> str:
    """Milliseconds, below one of them microseconds."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def megabytes(count: int | None) -> str:
    """Bytes as megabytes, below ten of them with a decimal; "n/a" for None."""
    if count is None:
        return "n/a"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 or not count else f"{count / 1e6:.1f} MB"
