"""Folders that are complete or absent: all their files on the disk, sealed with hashes, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from toolkit.errors import UserError
from toolkit.files import digest, sync_folder
from toolkit.records.marks import Seal

MARK = "complete.json"  # of a finished adapter, or of an export
SEAL = "sealed.json"  # of a complete checkpoint
# The disk is full, over quota, read-only or broken: of nobody's making but of whoever can make room.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# safetensors and torch's zip writer meet the same and raise errors of their own, torch without the reason.
WRITERS = {"No space left": "No space left on device", "Disk quota exceeded": "Disk quota exceeded"}
NOTHING_MORE = Seal()
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


@contextlib.contextmanager
def room(folder: Path, fix: str) -> Iterator[None]:
    """A disk that refuses a file ends the block with one message; `fix` is what to do beside making room."""
    try:
        yield
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        raise UserError(f"cannot write to {folder}: {problem}. Make room there, or {fix}") from error


def seal(folder: Path, name: str, mark: Seal = NOTHING_MORE) -> None:
    """Writes `mark` with the hash of every file to `folder/name`, after all of them have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes: dict[str, str | None] = {str(path.relative_to(folder)): digest(path, sync=True) for path in files}
    for inner in {path.parent for path in files}:
        sync_folder(inner)
    replace(mark, files=hashes).write(folder / name)


def put_in_place(made: Path, target: Path) -> None:
    """Renames a complete folder to `target`. An older one there goes last, so a kill leaves the one or the other.

    Between two renames there may be none for a moment: what it was made from is still there then.
    """
    old = made.with_name(f"{made.name.removesuffix('.tmp')}.old.tmp")  # swept as `made` is, after a kill
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def check(folder: Path) -> None:
    """Raises UserError when a folder that bears a seal is not what was sealed; one that bears none is not ours."""
    for name in (MARK, SEAL):
        if (folder / name).exists() and (problem := damage(folder, name)):
            raise UserError(
                f"{folder} is damaged: {problem}; nothing of it is used. Put the file back from a copy, or move the "
                "folder away and run the command that made it again: a stage saves its adapter again from its last "
                "checkpoint"
            )


def damage(folder: Path, name: str) -> str | None:
    """What is wrong with a folder that was sealed under `name`, None when nothing is."""
    seal = Seal.load(folder / name)
    if seal is None or seal.files is None:
        return f"{name} cannot be read" if (folder / name).exists() else "it was not finished"
    for file, expected in seal.files.items():
        try:
            if digest(folder / file) != expected:
                return f"{file} is not what was written"
        except OSError:
            return f"{file} is missing"
    return None
