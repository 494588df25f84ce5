"""What goes: runs that are named, or were moved aside. Nothing that a process holds is ever removed."""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import UserError
from toolkit.listing.entries import Entry
from toolkit.recipe import stages
from toolkit.records.marks import AdapterMark
from toolkit.run import locking
from toolkit.run.rundir import MOVED_ASIDE, WEIGHTS
from toolkit.run.sealing import MARK

REMOVING = (
    ".removing.tmp"  # ends the name of what is on its way out: a kill leaves nothing that looks like a run
)


@dataclass(frozen=True)
class Removal:
    """A file or folder that goes, and why. `lock` is the folder that no process may hold meanwhile."""

    name: str
    path: Path
    why: str
    size_bytes: int
    lock: Path | None = None


def named(entries: Sequence[Entry], names: Iterable[str]) -> tuple[list[Removal], list[str]]:
    """The runs of these names, and what those that stay lose by it.

    Raises UserError for names that are none, and for runs that a process holds, all at once.
    """
    known = {entry.full_name: entry for entry in entries}
    problems, chosen = [], []
    for name in dict.fromkeys(name.strip("/") for name in names):
        entry = known.get(name)
        lock = lock_of(entry) if entry else None
        if entry is None:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "run_list.py names them, as tiny/dpo-beta02"
            )
            problems.append(f"--remove {name}: there is no such run; {hint}")
        elif entry.outcome == "running" or (lock and locking.is_held(lock)):
            problems.append(f"--remove {name}: a process holds it; stop that first")
        elif entry.path.is_symlink():
            problems.append(
                f"--remove {name}: {entry.path} is a link to {entry.path.resolve()}; remove both by hand"
            )
        else:
            chosen.append(entry)
    if problems:
        raise UserError(*problems)
    gone = {entry.full_name for entry in chosen}
    lost = [
        f"{other.full_name} continues {entry.full_name}: without it an unfinished run does not go on, and a finished "
        "one lacks its reference in comparisons and evaluations"
        for entry in chosen
        for other in continued_by(entry, entries)
        if other.full_name not in gone
    ]
    return [_of(entry, entry.outcome) for entry in chosen], lost


def moved_aside(entries: Sequence[Entry]) -> tuple[list[Removal], list[str]]:
    """The runs that were moved aside, and a line for each that stays because a run that stays continues it."""
    going = [entry for entry in entries if MOVED_ASIDE.search(entry.name) and not entry.path.is_symlink()]
    kept: list[str] = []
    while needed := [
        (entry, by) for entry in going for by in continued_by(entry, entries) if by not in going
    ]:
        kept += [f"{entry.full_name} stays: {by.full_name} continues it" for entry, by in needed]
        going = [entry for entry in going if entry not in [one for one, _ in needed]]
    return [_of(entry, "moved aside") for entry in going], kept


def continued_by(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """The runs that went on from the adapter or a checkpoint of this one, not from another of its name."""
    variant, weights = MOVED_ASIDE.sub("", entry.path.name), _weights(entry.path)
    standing = entry.path.with_name(variant)
    is_replaced = entry.path == standing or _weights(standing) != weights

    def is_start_of(other: Entry) -> bool:
        if other.start_hash is None or other is entry:
            return False
        start = other.made_from[0]
        if not stages.is_variant(start):
            return Path(start).is_relative_to(entry.path.absolute())
        if weights is None:  # unfinished, or damaged: its name is all there is
            return (other.recipe, start) == (entry.recipe, entry.name)
        is_same = (other.recipe, start, other.start_hash) == (entry.recipe, variant, weights)
        return is_same and is_replaced  # else it was trained again, to the same bits

    return list(filter(is_start_of, entries))


def _weights(run: Path) -> str | None:
    """The hash of a finished adapter, as its mark has it."""
    mark = AdapterMark.load(run / "adapter" / MARK)
    return ((mark and mark.files) or {}).get(WEIGHTS)


def _of(entry: Entry, why: str) -> Removal:
    return Removal(entry.full_name, entry.path, why, entry.size_bytes, lock_of(entry))


def lock_of(entry: Entry) -> Path | None:
    """The folder whose lock the maker of an entry holds; None for one that was moved aside, which has none."""
    if MOVED_ASIDE.search(entry.name):
        return None
    return entry.path.with_name(entry.path.name.partition(".")[0])


def remove(removals: Iterable[Removal]) -> list[Removal]:
    """Removes one after the other; returns what is gone. Raises UserError for those that did not go, at the end."""
    gone: list[Removal] = []
    problems: list[str] = []
    for removal in removals:
        try:
            with locking.locked(removal.lock, "another run") if removal.lock else contextlib.nullcontext():
                _delete(removal.path)
            gone.append(removal)
        except UserError as error:
            problems += error.problems
        except FileNotFoundError:
            continue  # someone else was first
        except OSError as error:
            problems.append(f"{removal.path} cannot be removed: {error.strerror or error}")
    if problems:
        raise UserError(*problems)
    return gone


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    leaving = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}{REMOVING}")
    path.rename(leaving)
    shutil.rmtree(leaving)
