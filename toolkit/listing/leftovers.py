"""What nothing needs any more: runs moved aside, failed exports, what killed processes left, unused caches."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from toolkit.export.artefact import FAILED
from toolkit.listing import removal
from toolkit.listing.entries import EXPORT, Entry, folders, size_bytes
from toolkit.listing.removal import Removal
from toolkit.recipe import stages
from toolkit.run import caches, locking
from toolkit.run.replacing import UNFINISHED

UNUSED_DAYS = 30
DAY_SECONDS, HOUR_SECONDS = 24 * 3600, 3600


def find(
    root: Path, entries: Sequence[Entry], unused_days: int = UNUSED_DAYS
) -> tuple[list[Removal], list[str]]:
    """All of it that no process holds, and a line for each thing that stays although it looks like one."""
    aside, kept = removal.moved_aside(entries)
    gone = {one.path for one in aside}
    staying = [entry for entry in entries if entry.path not in gone]
    found = [*aside, *_failed(staying), *_temporary(root, staying), *_unused(staying, unused_days)]
    return [one for one in found if one.lock is None or not locking.is_held(one.lock)], kept


def _failed(entries: Sequence[Entry]) -> Iterator[Removal]:
    whys = {FAILED: "an export that did not pass its check", UNFINISHED: "broke off before it was complete"}
    for entry in entries:
        for suffix, why in whys.items():
            if entry.name.endswith(suffix) and entry.outcome == "failed":
                yield Removal(entry.full_name, entry.path, why, entry.size_bytes, removal.lock_of(entry))


def _temporary(root: Path, entries: Sequence[Entry]) -> Iterator[Removal]:
    """What has a temporary name. Beside a run the folder that it was to be is locked while somebody writes it."""
    why = "left by a process that was killed"
    for place in (place for recipe in folders(root) for place in (recipe, recipe / EXPORT)):
        for path in sorted(place.glob("*.tmp")):
            lock = place / path.name.lstrip(".").partition(".")[0]
            yield Removal(str(path.relative_to(root)), path, why, size_bytes(path), lock)
    for entry in entries:
        if entry.stage in stages.names():
            for path in sorted(entry.path.glob(".*.tmp")):
                yield Removal(
                    str(path.relative_to(root)), path, why, size_bytes(path), removal.lock_of(entry)
                )


def _unused(entries: Sequence[Entry], unused_days: int) -> Iterator[Removal]:
    """Entries of the caches. What a run needs it used after its start, so what was used since the oldest of those that
    stay is kept for so many days; and in any case what a run that goes on may use, or one that began elsewhere."""
    now = time.time()
    starts = [(entry.outcome, entry.started.timestamp() - HOUR_SECONDS) for entry in entries if entry.started]
    running = min((start for outcome, start in starts if outcome == "running"), default=now)
    oldest = min((start for _, start in starts), default=now)
    for kind, path in _cached():
        try:
            used = path.stat().st_mtime
        except OSError:
            continue
        days = (now - used) / DAY_SECONDS
        if path.name.startswith(caches.MAKING):
            why = "left by a process that was killed" if now - used > caches.ABANDONED_SECONDS else None
        elif used >= min(running, now - HOUR_SECONDS):
            why = None
        elif used < oldest:
            why = f"{kind} that no run here needs, last used {datetime.fromtimestamp(used, UTC):%Y-%m-%d}"
        else:
            why = f"{kind}, not used for {days:.0f} days" if days > unused_days else None
        if why and not _is_open(path):
            yield Removal(f"{path.parent.name}/{path.name}", path, why, size_bytes(path))


def _cached() -> Iterator[tuple[str, Path]]:
    for path in folders(caches.prepared_rows()):
        yield "prepared rows", path
    for path in sorted(caches.log_probs().glob(f"*{caches.LOG_PROBS}")):
        yield "reference log-probs", path


def _is_open(path: Path) -> bool:
    """Whether a process computes these log-probs now; prepared rows, which are never changed, may go under a reader."""
    if path.is_dir():
        return False
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
