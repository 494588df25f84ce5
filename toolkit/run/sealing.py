"""Folders that are complete or absent: all their files on the disk, sealed with hashes, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.run.files import sync_folder, write_json

CHUNK = 2**20
# The disk is full, over quota, read-only or broken: of nobody's making but of whoever can make room.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# safetensors and torch's zip writer meet the same and raise errors of their own, torch without the reason.
WRITERS = {"No space left": "No space left on device", "Disk quota exceeded": "Disk quota exceeded"}
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


def disk_problem(error: BaseException) -> str | None:
    """What the disk refused when `error` tells of that; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in DISK_ERRNOS else None
    if not isinstance(error, (SafetensorError, RuntimeError)):
        return None
    text = str(error)
    for said, reason in WRITERS.items():
        if said in text:
            return reason
    if isinstance(error, SafetensorError) and "Io" in text:
        return text.partition("\n")[0]
    return "a file could not be written" if any(name in text for name in TORCH_WRITER) else None


def seal(folder: Path, name: str, facts: dict[str, Any] | None = None) -> None:
    """Writes `facts` and the hash of every file to `folder/name`, after all of them have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): digest(path, sync=True) for path in files}
    for inner in {path.parent for path in files}:
        sync_folder(inner)
    write_json(folder / name, (facts or {}) | {"files": hashes})


def put_in_place(made: Path, target: Path) -> None:
    """Renames a sealed folder to `target`. An older one there goes last, so a kill leaves the one or the other.

    Between two renames there may be none for a moment: what it was made from is still there then.
    """
    old = made.with_name(f".{target.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path, name: str) -> str | None:
    """What is wrong with a folder that was sealed under `name`, None when nothing is."""
    try:
        hashes = json.loads((folder / name).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "it was not finished"
    for file, expected in hashes.items():
        try:
            if digest(folder / file) != expected:
                return f"{file} is not what was written"
        except OSError:
            return f"{file} is missing"
    return None


def digest(path: Path, sync: bool = False) -> str:
    """BLAKE2b of a file, 128 bits; `sync` flushes it to disk first."""
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()
