"""Checks that run in several processes, which are one torch.distributed group."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What a collective may wait for processes that do not come: then it raises, in each that waits.
PATIENCE = timedelta(seconds=15)

Check = Callable[[int, int], Any]


def run(
    checks: Mapping[str, Check], world: int, folder: Path, seconds: float = 90,
    one_group: bool = False,
) -> dict[str, list[str]]:  # fmt: skip
    """By check, what each rank says of it: "" if `check(rank, world)` raised nothing.

    The processes start once, as importing torch takes them seconds, and each check has a group of
    its own, so that one that fails leaves nothing to the next. one_group: of hundreds of small
    checks a group takes most of the time; a new one is made after one that failed alone. After
    `seconds` all are killed.
    """
    # Its server imports torch, once, and starts no threads; a fork of pytest's process might hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "neglog.grad_cache"])
    running, receivers = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (rank, world, str(folder), dict(checks), one_group, sender)
        running.append(context.Process(target=_work, args=arguments, daemon=True))
        receivers.append(receiver)
        running[-1].start()
        sender.close()
    end = time.monotonic() + seconds
    found = [_receive(receiver, end) for receiver in receivers]
    for process in running:
        process.kill()
        process.join()
    missing = f"no answer after {seconds} s"
    return {name: [said.get(name, missing) for said in found] for name in checks}


def _receive(receiver: Any, end: float) -> dict[str, str]:
    said = {}
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            name, error = receiver.recv()
            said[name] = error
    except EOFError:  # its process has ended
        pass
    return said


def _work(
    rank: int, world: int, folder: str, checks: dict[str, Check], one_group: bool, sender: Any
) -> None:
    torch.set_num_threads(1)
    for number, (name, check) in enumerate(checks.items()):
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world,
                timeout=PATIENCE,
            )  # fmt: skip
        error = ""
        try:
            check(rank, world)
        except BaseException:
            error = traceback.format_exc()
        if not (one_group and _all_passed(error)):
            dist.destroy_process_group()
        sender.send((name, error))
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_passed(error: str) -> bool:
    """Whether the group is as it was before the check, in all processes."""
    failed = torch.tensor(int(bool(error)))
    try:
        dist.all_reduce(failed)
    except RuntimeError:
        return False
    return not failed
