"""The list again and again: a run is read anew only where something in its folder has changed."""

from __future__ import annotations

import os
from pathlib import Path

from toolkit.listing.entries import Entry, folders, stage_run
from toolkit.recipe import stages
from toolkit.run.rundir import RunDir

Signs = tuple[tuple[int, int] | None, ...]


class Listed:
    """Stage runs under a folder; those that were moved aside, comparisons, evaluations and exports are left out."""

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[Path, tuple[Signs, Entry]] = {}

    def entries(self) -> list[Entry]:
        known = {}
        for folder in (folder for recipe in folders(self._root) for folder in folders(recipe)):
            if not stages.is_variant(folder.name):
                continue
            run, before = RunDir(self._root, folder.parent.name, folder.name), self._known.get(folder)
            signs = _signs(run)
            # A process that ends without a word changes no file.
            if before is None or before[0] != signs or before[1].outcome == "running":
                before = signs, stage_run(run, run.name)
            known[folder] = before
        self._known = known
        return [entry for _, entry in known.values()]


def _signs(run: RunDir) -> Signs:
    """Of life: when what grows or is replaced was last written, and its size."""
    found: list[tuple[int, int] | None] = []
    for path in (run.path, run.manifest, run.metrics, run.report, run.checkpoints):
        try:
            state = os.stat(path)
            found.append((state.st_mtime_ns, state.st_size))
        except OSError:
            found.append(None)
    return tuple(found)
