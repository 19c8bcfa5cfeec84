"""Files the commands write. One that neglog did not make is never overwritten unasked."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from . import Refusal

MARK = "neglog"
PNG_METADATA = {"Software": MARK}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def made_by_us(path: Path) -> bool:
    """Whether neglog wrote the file: PNG by its Software text, JSON by its made_by key."""
    content = path.read_bytes()
    if content.startswith(_PNG_SIGNATURE):
        return f"Software\0{MARK}".encode() in _png_texts(content)
    try:
        report = json.loads(content)
    except ValueError:
        return False
    return isinstance(report, dict) and report.get("made_by") == MARK


def _png_texts(content: bytes) -> list[bytes]:
    texts, start = [], len(_PNG_SIGNATURE)
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        if kind == b"tEXt":
            texts.append(content[start + 8 : start + 8 + length])
        start += 12 + length  # length, kind and checksum are 4 bytes each
    return texts


def check_output(name: str | None, suffix: str, force: bool) -> Path | None:
    """The path to write to. Called before any work, so that nobody waits for a refusal."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise Refusal(f"{name}: expected a name that ends in {suffix}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise Refusal(f"{name}: {path.parent} is not a folder that can be written to")
    if not path.exists():
        return path
    if not path.is_file():
        raise Refusal(f"{name}: exists and is not a file")
    if not force and not made_by_us(path):
        raise Refusal(
            f"{name}: exists and was not made by neglog; --force overwrites it, or give another "
            "name"
        )
    return path


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report, marked as ours. Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps({"made_by": MARK} | report, indent=1, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, marked as ours. Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", metadata=PNG_METADATA)
    partial.replace(path)
