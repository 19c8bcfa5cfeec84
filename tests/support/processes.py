"""Code in an interpreter of its own."""

import os
import subprocess
import sys


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder where nothing of the checkout is importable but what is installed."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
