"""Comparisons and evaluations: a new one takes the place of the earlier one, and only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit.errors import Interrupted, UserError
from toolkit.run.rundir import RunDir
from toolkit.run.runlog import LOG
from toolkit.run.sealing import put_in_place, room

UNFINISHED = ".unfinished"  # ends the name of the folder while it is written


@contextmanager
def replacing(run: RunDir, console: Console) -> Iterator[Path]:
    """A folder to write into, which becomes the run's own when the block is done; an earlier one is moved aside then.

    The run's directory is locked meanwhile, and log.txt grows in the new folder. That folder stays, for its log, when
    the block ends by an internal error, and goes when it ends otherwise. Raises UserError where another process holds
    the directory.
    """
    folder = run.path.with_name(f"{run.path.name}{UNFINISHED}")
    with run.locked():
        shutil.rmtree(folder, ignore_errors=True)
        LOG.open(folder / run.log.name, console)
        try:
            with room(run.path, "take --runs DIR on another disk, with the stages that it reads"):
                yield folder
                moved = run.move_aside()
                put_in_place(folder, run.path)
            LOG.path = run.log
        except (UserError, Interrupted, KeyboardInterrupt):
            LOG.close_file()
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if moved:
        console.print(f"[dim]what was there is now {escape(str(moved))}[/]")
