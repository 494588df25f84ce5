"""One writer of a folder at a time: a lock beside it, which the kernel lets go of when its process dies."""

from __future__ import annotations

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
            holder = stream.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}: wait for it, or choose {option}") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


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
