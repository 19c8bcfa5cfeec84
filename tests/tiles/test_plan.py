"""How large a tile is."""

import pytest

from neglog.tiles import plan


def test_the_workspace_is_kept_to(monkeypatch):
    assert plan.workspace_bytes() == 64 << 20
    assert plan.workspace_bytes(1.5) == 3 << 19
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "8")
    assert plan.workspace_bytes() == 8 << 20
    assert plan.rows_per_tile(10_000, 1 << 17, 64 << 20) == 512
    assert plan.rows_per_tile(10_000, 1 << 30, 64 << 20) == plan.ROWS
    assert plan.rows_per_tile(7, 4, 64 << 20) == 7
    assert [s.stop - s.start for s in plan.row_tiles(10, 4)] == [4, 4, 2]
    monkeypatch.setenv("NEGLOG_WORKSPACE_MB", "much")
    with pytest.raises(ValueError, match="NEGLOG_WORKSPACE_MB: expected a number above 0"):
        plan.workspace_bytes()
