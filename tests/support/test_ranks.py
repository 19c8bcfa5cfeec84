"""tests.support.ranks: what a check that fails, and one that never ends, leave to the others."""

import multiprocessing
import time

import torch.distributed as dist

from tests.support import ranks


def fails_on_one(rank, world):
    assert rank == 0, "the second"


def goes_on(rank, world):
    dist.barrier()


def never_ends(rank, world):
    if rank == 1:
        time.sleep(1000)


def test_a_check_that_never_ends_is_killed(tmp_path):
    """Those before it are told of, those after it have no answer, and no process stays."""
    checks = {check.__name__: check for check in (fails_on_one, goes_on, never_ends)}
    said = ranks.run({**checks, "after": goes_on}, 2, tmp_path, seconds=9)
    assert said["fails_on_one"][0] == ""
    assert said["fails_on_one"][1].endswith("AssertionError: the second\n")
    assert said["goes_on"] == ["", ""]
    assert said["never_ends"] == ["", "no answer after 9 s"]
    assert said["after"][1] == "no answer after 9 s"
    assert not multiprocessing.active_children()
