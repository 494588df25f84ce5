"""What the board tells of runs, ready for JSON."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.board.differences import between
from toolkit.board.growing import Kept
from toolkit.board.listed import Listed
from toolkit.board.overlay import COLOURS, MOST_RUNS, Overlay, overlay
from toolkit.errors import UserError
from toolkit.listing import view
from toolkit.recipe import stages
from toolkit.redaction import blanked, redacted
from toolkit.report import figures, growing_figures, run_record
from toolkit.report.headline import headline, tiles
from toolkit.report.tables import data_section, memory_section
from toolkit.run.rundir import RunDir

MOST_DRAWN = 16  # sets of figures that are kept; one takes some 0.2 MB
LOG_BYTES = 2**14  # of the log's end


class Board:
    """The runs under one folder."""

    def __init__(self, root: Path):
        self.root = root
        self._kept, self._list = Kept(), Listed(root)
        self._drawn: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def listed(self) -> list[dict[str, Any]]:
        """A row a run, newest first, in the words of `run_list.py`."""
        found = sorted(self._list.entries(), key=lambda one: one.when.timestamp() if one.when else 0.0)
        return [
            {"name": one.full_name, "outcome": one.outcome, "cells": view.cells(one)}
            for one in reversed(found)
        ]

    def curves(self, names: Sequence[str], shape: str) -> dict[str, Any]:
        """The figures of chosen runs. Of the `shape` that the page has already only what they hold now."""
        chosen = self.runs(names)
        if not chosen:
            return {"shape": "", "titles": [], "columns": {}}
        drawn = overlay(
            {f"{run.recipe}/{run.name}": (run.stage, self._kept.series(run.metrics)) for run in chosen}
        )
        now = f"{growing_figures.shape(drawn.charts, drawn.series)} {' '.join(names)}" if drawn.charts else ""
        told: dict[str, Any] = {"shape": now, "titles": [], "columns": {}, "colours": COLOURS[: len(chosen)]}
        if not drawn.charts:
            return told
        told["steps"] = figures.spanned(drawn.charts, drawn.series)
        told["columns"] = growing_figures.columns(drawn.charts, drawn.series)
        return told if now == shape else told | self._figures(now, drawn)

    def _figures(self, shape: str, drawn: Overlay) -> dict[str, Any]:
        """Bokeh takes a second to write them: those that were drawn before are taken again, and what they hold is sent
        beside them."""
        if shape not in self._drawn:
            titles = [{"title": chart.title, "about": chart.about} for chart in drawn.charts]
            self._drawn[shape] = {"titles": titles} | growing_figures.embedded(
                drawn.charts, drawn.series, legends=drawn.has_legends
            )
            while len(self._drawn) > MOST_DRAWN:
                self._drawn.popitem(last=False)
        return self._drawn[shape]

    def differences(self, names: Sequence[str]) -> Any:
        return blanked(between(self.runs(names)))

    def details(self, name: str) -> dict[str, Any]:
        """One run: how it goes, its figures, memory and rows, as its report says them; the end of its log."""
        [run] = self.runs([name])
        record = run_record.read(run)
        html = ""
        if record:
            html = (
                headline(record) + tiles(record) + memory_section(record.report) + data_section(record.data)
            )
        report = f"{run.recipe}/{run.name}/{run.page.name}" if run.page.exists() else None
        return {"html": blanked(html), "log": _end(run.log), "report": report}

    def runs(self, names: Sequence[str]) -> list[RunDir]:
        """Those of full names. Raises UserError for one that is none, and for too many."""
        if len(names) > MOST_RUNS:
            raise UserError(f"{len(names)} runs are chosen; at most {MOST_RUNS} at one time")
        return [self._run(name) for name in dict.fromkeys(names)]

    def of_one_recipe(self, names: Sequence[str]) -> list[RunDir]:
        """Raises UserError for runs of several: their prompts are not the same."""
        chosen = self.runs(names)
        recipes = dict.fromkeys(run.recipe for run in chosen)
        if len(recipes) != 1:
            raise UserError(
                f"answers are compared within one recipe; chosen are {', '.join(recipes) or 'none'}"
            )
        return chosen

    def _run(self, name: str) -> RunDir:
        recipe, _, variant = name.partition("/")
        folder = inside(self.root, name)
        if folder is None or not stages.is_variant(variant):
            raise UserError(f"there is no run {name}")
        return RunDir(self.root, recipe, variant)


def inside(root: Path, path: str) -> Path | None:
    """What a path names under a folder; None for what lies elsewhere, or is not there."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return None
    found = root.joinpath(*parts)
    return found if found.exists() else None


def _end(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return redacted(text if len(text) < LOG_BYTES else text.partition("\n")[2])
