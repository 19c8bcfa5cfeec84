"""The tables that list names list all of them, and none that is gone."""

import inspect
import re

import pytest
import torch

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


NEGATIVES = {
    "no `negative_keys`": {},
    '`"unpaired"`': {"negative_keys": torch.ones(3, 4)},
    '`"paired"`': {"negative_keys": torch.ones(3, 3, 4), "negative_mode": "paired"},
    '`"in_batch"`': {"negative_keys": torch.ones(3, 4), "negative_mode": "in_batch"},
}
GIVEN = {
    "symmetric": True,
    "positives": torch.arange(3)[:, None],
    "exclude": torch.arange(3),
    "negative_ids": torch.arange(3),
    "hard_negative_weight": 1.0,
    "own_negative_weight": 1.0,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_options_go_with_the_negatives_that_the_table_says(negatives):
    x, rows = torch.ones(3, 4), table("docs/losses.md", negatives)
    assert [code(row["option"]) for row in rows] == [[name] for name in GIVEN]
    for row in rows:
        options = {name: GIVEN[name] for name in code(row["option"])}
        needed = {name: GIVEN[name] for name in code(row[negatives])}
        if needed or row[negatives] == "no":
            with pytest.raises(ValueError, match="expected"):
                neglog.info_nce(x, x, **NEGATIVES[negatives], **options)
        if row[negatives] != "no":
            neglog.info_nce(x, x, **NEGATIVES[negatives], **options, **needed)


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
