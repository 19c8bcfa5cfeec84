"""Commands in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def neglog(*arguments: str, code: str | None = None, cwd: Path | None = None, **environment: str):
    """Another process: its output is no terminal, and what it forbids itself stays forbidden."""
    command = ["-m", "neglog", *arguments] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd,
        env=os.environ | environment,
    )  # fmt: skip


def without(modules: Iterable[str], *arguments: str):
    """The command where packages are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r}))\n"
        f"from neglog.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return neglog(code=code)
