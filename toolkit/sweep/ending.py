"""What a sweep leaves: sweep.json and its page, written after every run, and the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.records.sweep_report import Sweep
from toolkit.sweep import page, results, table
from toolkit.sweep.points import SWEEPS, Asked
from toolkit.sweep.results import Compared, Result

SWEEP, PAGE = "sweep.json", "sweep.html"


class Ending:
    """Where the results of a sweep go."""

    def __init__(self, sweep: Asked, root: Path):
        self._sweep, self._root = sweep, root
        self.page = sweep.folder / PAGE

    def write(self, failed: dict[str, str]) -> tuple[list[Result], list[Compared]]:
        """As it stands now, which it returns too; `failed` says why runs could not go on."""
        record = self._sweep.record(failed)
        record.write(self._sweep.folder / SWEEP)
        return write(self._root, record, self.page)

    def facts(self) -> dict[str, Any]:
        """What `--on-finish` is told: steps and seconds of all runs, the loss of none."""
        found = results.read(self._root, self._sweep.record({}))
        return {
            "NAME": f"{self._sweep.points[0].recipe.name}/{SWEEPS}/{self._sweep.name}",
            "DIR": self._sweep.folder.absolute(),
            "STEPS": sum(one.num_steps for one in found),
            "SECONDS": round(sum(one.seconds or 0.0 for one in found)),
        }

    def show(self, failed: dict[str, str], console: Console) -> None:
        """The table. Raises UserError, once all is shown, where a run failed."""
        found, compared = self.write(failed)
        table.show(found, compared, console)
        if failed:
            raise UserError(
                f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}; see {self.page}. The same command "
                "tries them again and leaves the others as they are"
            )


def write(root: Path, sweep: Sweep, file: Path) -> tuple[list[Result], list[Compared]]:
    """The page of what stands there, and that."""
    found = results.read(root, sweep)
    compared = results.compare(sweep.stage or "", found)
    write_text(file, page.page(sweep, found, compared))
    return found, compared
