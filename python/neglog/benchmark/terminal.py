"""The console the commands print on, and the packages they need to do it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from neglog.benchmark import Refusal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# A pipe has no width; rich would take 80 columns and fold the tables.
PIPED_WIDTH = 100


def need(name: str, purpose: str, extra: str = "demo") -> ModuleType:
    """The module `name`; if it is not installed, a refusal that says which extra brings it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise Refusal(f"{purpose} needs {package}: pip install 'neglog[{extra}]'") from error


def console(purpose: str) -> Console:
    """rich's console, wide enough for the tables when its output is piped."""
    made = need("rich.console", purpose).Console(highlight=False)
    if not made.is_terminal:
        made.width = PIPED_WIDTH
    return made


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column to the left, the others to the right."""
    box = importlib.import_module("rich.box").SIMPLE_HEAD
    made: Any = importlib.import_module("rich.table").Table(
        title=title, box=box, title_justify="left", title_style="bold", pad_edge=False
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return made


def duration(seconds: float) -> str:
    """Milliseconds, below one of them microseconds."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def megabytes(count: int | None) -> str:
    """Bytes as megabytes, below ten of them with a decimal; "n/a" for None."""
    if count is None:
        return "n/a"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 or not count else f"{count / 1e6:.1f} MB"
