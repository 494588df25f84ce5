"""Files that are complete or absent: a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none: temporary name, flush to disk, rename. Half a character is written as `\\ud83d`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # the room it took is wanted
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all; NaN and infinity become null. What programs load is written as it is."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk: a rename lasts once its folder does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, sync: bool = False) -> str:
    """BLAKE2b of a file, 128 bits; `sync` flushes it to disk first."""
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def finite(value: Any) -> Any:
    """The same tree with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
