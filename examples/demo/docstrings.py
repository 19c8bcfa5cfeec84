"""The docstrings of installed libraries: English about programs, to pretrain on."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
WORDS = 40  # shorter ones are mostly signatures
# What the demo needs anyway. The standard library comes first; --quick reads the first two alone.
LIBRARIES, QUICK_LIBRARIES = ("", "numpy", "torch", "matplotlib", "networkx"), 2
# Folders that are no library's own prose, and the text that is fine-tuned on.
LEFT_OUT = {"site-packages", "test", "tests", "testing", "idle_test", "pydoc_data"}


def read(quick: bool) -> str:
    """The distinct ones, in the order of the files' names."""
    found: dict[str, None] = {}
    for folder in _folders(LIBRARIES[: QUICK_LIBRARIES if quick else None]):
        for path in sorted(folder.rglob("*.py")):
            if LEFT_OUT.intersection(path.relative_to(folder).parts):
                continue
            for raw in DOCSTRING.findall(path.read_text(encoding="utf-8", errors="replace")):
                text = " ".join(raw.split())
                if text.count(" ") >= WORDS:
                    found[text] = None
    return "\n".join(found)


def _folders(names: tuple[str, ...]) -> Iterator[Path]:
    """Where each library lies; one that is not installed is left out."""
    for name in names:
        spec = find_spec(name) if name else None
        if not name:
            yield Path(sysconfig.get_path("stdlib"))
        elif spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent
