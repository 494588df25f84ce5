"""Checkpoints that are whole or absent, and are proved so before they are trusted.

The Trainer's own checkpoint is written under a temporary name, sealed with the hashes of its files and renamed. A
checkpoint without its seal, or with a file that no longer matches it, is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.rundir import PREFIX, SEAL, write_json

CHUNK = 2**20


class DurableCheckpoints:
    """Mixin for a Trainer: how its checkpoints reach the disk. `save_total_limit` of them stay, and the best one.

    A disk that is full costs the checkpoint, not the run: what was begun is removed, the last good one stays, and
    the next save tries again.
    """

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"{PREFIX}{self.state.global_step}"
        staging = folder / ".staging"
        shutil.rmtree(staging, ignore_errors=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # pruned below
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            seal(staging / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (staging / name).rename(folder / name)
            _sync(folder)
        except OSError as error:
            good = max(_steps(folder), default=None)
            self.recovery.console.print(
                f"[yellow]checkpoint at step {self.state.global_step} not saved ({error.strerror or error}); "
                f"{'there is none yet' if good is None else f'the last good one is of step {good}'}; "
                "training goes on and the next save tries again[/]"
            )
        finally:
            self.args.output_dir, self.args.save_total_limit = str(folder), limit
            shutil.rmtree(staging, ignore_errors=True)
        for step in sorted(_steps(folder))[:-limit]:
            if step != self.state.best_global_step:
                shutil.rmtree(folder / f"{PREFIX}{step}", ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Writes the hash of every file to SEAL, after all of them have reached the disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(checkpoint)): _digest(path, sync=True) for path in files}
    write_json(checkpoint / SEAL, hashes)
    _sync(checkpoint)


def latest(folder: Path, console: Console) -> Path | None:
    """The newest checkpoint whose files are all as they were sealed; others are named and passed over."""
    shutil.rmtree(folder / ".staging", ignore_errors=True)
    for step in sorted(_steps(folder), reverse=True):
        checkpoint = folder / f"{PREFIX}{step}"
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        console.print(f"[yellow]checkpoint of step {step} is passed over: {problem}[/]")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None when nothing is."""
    try:
        hashes = json.loads((checkpoint / SEAL).read_text())
    except (OSError, ValueError):
        return "it was not finished"
    for name, digest in hashes.items():
        try:
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _steps(folder: Path) -> list[int]:
    names = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return [int(name) for name in names if name.isdigit()]


def _digest(path: Path, sync: bool = False) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _sync(folder: Path) -> None:
    """A rename is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
