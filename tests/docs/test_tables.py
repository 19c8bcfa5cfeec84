"""The tables that list names list all of them, and none that is gone."""

import inspect
import re

import neglog
from tests.support import code_blocks
from tests.support.code_blocks import ROOT


def table(page: str, column: str) -> list[dict[str, str]]:
    """The rows, by name of column, of the page's first table that has that column."""
    for names, rows in code_blocks.tables(code_blocks.read(ROOT / page)):
        if column in names:
            return [dict(zip(names, row, strict=True)) for row in rows]
    raise AssertionError(f"{page}: no table with a column {column!r}")


def code(cell: str) -> list[str]:
    return code_blocks.CODE_SPAN.findall(cell)


def test_options_of_the_losses_are_those_of_their_signatures():
    """A loss that gains or loses an option changes docs/losses.md."""
    rows = table("docs/losses.md", "options")
    shown = {code(row["loss"])[0]: set(code(row["options"])) for row in rows}
    losses = {name for name in shown if inspect.isfunction(getattr(neglog, name))}
    assert losses == set(shown)
    for name, options in shown.items():
        parameters = inspect.signature(getattr(neglog, name)).parameters.values()
        optional = {p.name for p in parameters if p.default is not p.empty}
        assert options == optional - {"negative_keys"}, name


def test_every_loss_is_listed():
    rows = table("docs/losses.md", "options")
    functions = {name for name in neglog.__all__ if inspect.isfunction(getattr(neglog, name))}
    losses = functions - {"cached_step", "explain"}
    assert {code(row["loss"])[0] for row in rows} == losses


def test_environment_variables_are_those_that_the_sources_read():
    sources = [ROOT / "setup.py", *(ROOT / "kernels").rglob("*.py")]
    sources += (ROOT / "python").rglob("*.py")
    read = {
        name
        for source in sources
        for name in re.findall(r"\b(NEGLOG_[A-Z_]+)\b", source.read_text(encoding="utf-8"))
    }
    rows = table("docs/routes.md", "environment variable")
    listed = {re.split("=", name)[0] for row in rows for name in code(row["environment variable"])}
    assert listed == read
