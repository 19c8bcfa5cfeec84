"""A process that dies, hangs or is cut off in the middle of a step: the others get an error in the
group's time, and none waits for ever.

The last are processes on hosts of their own: network namespaces with a bridge between them, of
which one's link is taken down. Where these cannot be made, it is the first two that show it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SECONDS = 3  # of the group
WORLD = 3
Popen = subprocess.Popen

# The steps of a process. What it prints at last is the error it got, and after how many seconds.
STEPS = """
import sys, time, os, datetime, torch, neglog
import torch.distributed as dist
rank, world, method, seconds, loss, exchange, fault, mark = sys.argv[1:]
rank, world = int(rank), int(world)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world,
                        timeout=datetime.timedelta(seconds=int(seconds)))
group = dist.group.WORLD

def step():
    x, y = (torch.randn(300, 64, requires_grad=True) for _ in range(2))
    if loss == "clip":
        value = neglog.clip_loss(x, y, 2.0, group=group, exchange=exchange)
    elif loss == "siglip":
        value = neglog.siglip_loss(x, y, 2.0, -1.0, group=group, exchange=exchange)
    else:
        value = neglog.nt_xent(x, y, group=group, exchange=exchange)
    if rank == 1 and number == 3:
        if fault == "dies":
            os._exit(1)
        if fault == "hangs":
            time.sleep(60)
    value.backward()

for number in range(100000):
    if number == 3:
        open(f"{mark}{rank}", "w").close()
    start = time.monotonic()
    try:
        step()
    except RuntimeError as error:
        print(f"{time.monotonic() - start:.1f}", type(error).__name__, error)
        break
os._exit(0)
"""


def start(rank: int, method: str, case: tuple[str, str, str], mark: Path, host: str = "") -> Popen:
    command = [sys.executable, "-c", STEPS, str(rank), str(WORLD), method, str(SECONDS), *case]
    prefix = ["ip", "netns", "exec", host] if host else []
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"} if host else dict(os.environ)
    return subprocess.Popen(
        [*prefix, *command, str(mark)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment, cwd="/",
    )  # fmt: skip


def said(processes: list[Popen], survivors: list[int]) -> None:
    """Each survivor got an error, in time."""
    try:
        for rank in survivors:
            found, _ = processes[rank].communicate(timeout=60)
            assert found, f"rank {rank} ended without an error, with {processes[rank].returncode}"
            seconds, kind, *_ = found.split()
            assert "Error" in kind, found
            assert float(seconds) < 2 * SECONDS + 2, found
    finally:
        for process in processes:
            process.kill()
            process.wait()


CASES = [
    ("nt_xent", "gather", "dies"), ("clip", "ring", "hangs"), ("siglip", "ring", "dies"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_a_process_is_lost(tmp_path: Path, case: tuple[str, str, str]) -> None:
    method = f"file://{tmp_path}/meet"
    processes = [start(rank, method, case, tmp_path / "mark") for rank in range(WORLD)]
    said(processes, [0, 2])


# Hosts


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Network namespaces, each with eth0 in 10.77.0.0/24 by way of a bridge in another."""
    made = []
    name = f"neglog{os.getpid()}"
    try:
        bridge = f"{name}s"
        ip("netns", "add", bridge)
        made.append(bridge)
        ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", bridge, "link", "set", "br0", "up")
        for rank in range(WORLD):
            host = f"{name}h{rank}"
            ip("netns", "add", host)
            made.append(host)
            ip(
                "-n",
                host,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                f"port{rank}",
                "netns",
                bridge,
            )
            ip("-n", bridge, "link", "set", f"port{rank}", "master", "br0", "up")
            ip("-n", host, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def can_make_hosts() -> bool:
    try:
        with hosts():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.skipif(not can_make_hosts(), reason="needs the right to make network namespaces")
def test_a_link_is_cut(tmp_path: Path) -> None:
    with hosts() as (bridge, *names):
        method = "tcp://10.77.0.1:29400"
        processes = [
            start(rank, method, ("clip", "ring", "none"), tmp_path / "mark", names[rank])
            for rank in range(WORLD)
        ]
        end = time.monotonic() + 60
        while not all((tmp_path / f"mark{rank}").exists() for rank in range(WORLD)):
            assert time.monotonic() < end, "the hosts did not meet"
            time.sleep(0.05)
        ip("-n", bridge, "link", "set", "port1", "down")
        said(processes, [0, 1, 2])
