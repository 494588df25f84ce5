"""One writer of a folder at a time: a lock beside it, which the kernel lets go of when its process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import UserError


@contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Holds a folder, there or not, for this process; the kernel lets go of it when the process dies, however it does.

    Raises UserError naming the process and host that hold it, and the `option` that names another folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = open(_lock(folder), "a+", encoding="utf-8", opener=_open_no_link)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose {option}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise UserError(_held(folder, stream.read(), option)) from None
        with contextlib.suppress(OSError):  # a full disk costs the name alone
            os.truncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def problem(folder: Path, option: str) -> str | None:
    """Why this process could not hold the folder now, as `locked` would say it; None when it could."""
    if is_held(folder):
        with contextlib.suppress(OSError):
            return _held(folder, _lock(folder).read_text(encoding="utf-8"), option)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        return f"cannot write to {folder}: {nearest} is no folder; choose {option}"
    if not os.access(nearest, os.W_OK | os.X_OK):
        why = "Read-only file system" if os.statvfs(nearest).f_flag & os.ST_RDONLY else "Permission denied"
        return f"cannot write to {folder}: {why}; choose {option}"
    return None


def _held(folder: Path, holder: str, option: str) -> str:
    return f"{folder} is in use by {holder.strip() or 'another process'}: wait for it, or choose {option}"


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder now. Asks by taking the lock for a moment, shared, so that two who ask do not
    see each other."""
    try:
        with _lock(folder).open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _open_no_link(path: str, flags: int) -> int:
    """A lock is emptied and written: through a link that would be another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
