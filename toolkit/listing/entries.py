"""Every run under a folder, as far as one line tells of it. There may be a thousand: files that grow are read at their
end alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from toolkit.errors import UserError
from toolkit.export.artefact import read_mark
from toolkit.recipe import stages
from toolkit.records.comparison_report import Comparison
from toolkit.records.evaluation_report import Evaluation
from toolkit.records.run_manifest import Manifest
from toolkit.records.run_report import RunReport
from toolkit.report.curves import Series
from toolkit.report.measures import OF_ANSWERS, OF_HELD_OUT
from toolkit.report.run_record import Outcome, measured, moment, outcome_of, read_series, written
from toolkit.run import locking
from toolkit.run.replacing import UNFINISHED
from toolkit.run.rundir import STARTED_FROM, RunDir
from toolkit.run.sealing import MARK

END_BYTES = 2**13  # of metrics.jsonl: over ten lines
BLOCK_BYTES = 512  # in which st_blocks counts, whatever the file system
EXPORT = "export"
REPORTS: dict[str, type[Comparison] | type[Evaluation]] = {"compare": Comparison, "eval": Evaluation}
STAGES = (*stages.names(), *REPORTS, EXPORT)
# "not begun": a preview, or a start that ended before its first record; "damaged": its manifest cannot be read
State = Literal[Outcome, "not begun", "damaged"]
STATES: tuple[str, ...] = tuple(dict.fromkeys((*get_args(Outcome), "not begun", "damaged")))
BUILT = re.compile(r"\.(.+)\.\d+(\.old)?\.tmp")  # an export under its temporary name


@dataclass(frozen=True)
class Entry:
    """A stage run, a comparison, an evaluation or an export. `name` is of its folder within the recipe's.

    `last` and `held_out` have the Trainer's own names; those of a comparison or evaluation name a measure, with a value
    for each model. `made_from` is what a run continues, or the models that the other kinds are of. `when` is its end
    or, without one, its last sign of life. `start_hash` is of the weights that it continues.
    """

    recipe: str
    name: str
    stage: str
    outcome: State
    path: Path
    when: datetime | None
    size_bytes: int
    started: datetime | None = None
    num_steps: int | None = None
    last: dict[str, float | None] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    made_from: list[str] = field(default_factory=list)
    start_hash: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.recipe}/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        moments = {name: moment and moment.isoformat() for name, moment in self._moments()}
        return asdict(self) | moments | {"name": self.full_name, "path": str(self.path)}

    def _moments(self) -> tuple[tuple[str, datetime | None], ...]:
        return (("when", self.when), ("started", self.started))


def find(root: Path) -> list[Entry]:
    """All of them, by recipe and name. Raises UserError where there is no such folder."""
    if not root.is_dir():
        raise UserError(f"no runs: there is no folder {root.absolute()}; name where they are with --runs DIR")
    return [
        entry for recipe in folders(root) for folder in folders(recipe) for entry in _entries(root, folder)
    ]


def folders(place: Path) -> list[Path]:
    """The folders in a place, by name; [] where there is none."""
    try:
        with os.scandir(place) as found:
            return sorted(place / item.name for item in found if item.is_dir())
    except OSError:
        return []


def size_bytes(path: Path) -> int:
    """What a file or folder takes on the disk; what goes meanwhile counts for nothing, links for themselves."""
    try:
        total = path.lstat().st_blocks * BLOCK_BYTES
        if path.is_dir():
            with os.scandir(path) as found:
                for item in found:
                    if item.is_dir(follow_symlinks=False):
                        total += size_bytes(Path(item.path))
                    else:
                        total += item.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
    except OSError:
        return 0
    return total


def _entries(root: Path, folder: Path) -> Iterator[Entry]:
    if folder.name.endswith(".tmp"):  # left by a process that was killed
        return
    kind = folder.name.partition(".")[0]  # without what a moved one has behind its name
    run = RunDir(root, folder.parent.name, folder.name)
    if stages.is_variant(kind):
        yield stage_run(run, kind)
    elif kind in REPORTS:
        yield _report(run, kind)
    elif folder.name == EXPORT:
        for made in folders(folder):
            if entry := _export(run.recipe, made):
                yield entry


def stage_run(run: RunDir, variant: str) -> Entry:
    """The run of a variant; its folder may have more behind that name, where it was moved aside."""
    manifest, series = run.read_manifest(), read_series(run.metrics, END_BYTES)
    outcome, known = _outcome(run, manifest), measured(series)
    shown = [panel_field.key for panel_field in stages.of(variant).panel_fields]
    evaluated = known["eval"]
    if evaluated is None and (report := RunReport.load(run.report)) and report.outcome == outcome:
        evaluated = report.eval  # logged before the end that was read
    started, last_sign = moment(manifest.started), written(run.metrics) or written(run.manifest)
    name, start_hash = _start(manifest)
    return Entry(
        recipe=run.recipe,
        name=run.name,
        stage=stages.of(variant).name,
        outcome=outcome,
        path=run.path,
        when=moment(manifest.ended) or last_sign or written(run.path),
        size_bytes=size_bytes(run.path),
        started=started,
        num_steps=known["num_steps"] if series else None,
        last={key: series[key].values[-1] for key in shown if series.get(key, Series()).values},
        held_out={key: value for key in shown if (value := (evaluated or {}).get(key)) is not None},
        seconds=_seconds(manifest, last_sign),
        made_from=[name] if name else [],
        start_hash=start_hash,
    )


def _outcome(run: RunDir, manifest: Manifest) -> State:
    if manifest.outcome is not None:
        return outcome_of(run, manifest.outcome)
    if run.is_held():
        return "running"
    return "damaged" if run.manifest.exists() and manifest == Manifest.unknown() else "not begun"


def _start(manifest: Manifest) -> tuple[str | None, str | None]:
    """(what the run continues, the hash of those weights); the base has none."""
    conditions = manifest.conditions or {}
    for key, value in conditions.items():
        if key.endswith(STARTED_FROM):
            return key.removesuffix(STARTED_FROM), str(value)
    return (stages.BASE if conditions else None), None


def _seconds(manifest: Manifest, last_sign: datetime | None) -> float | None:
    """Of all attempts; one that has not ended counts up to its last sign of life."""
    attempts = manifest.attempts or []
    total = sum(attempt.seconds or 0.0 for attempt in attempts[:-1])
    for attempt in attempts[-1:]:
        begun = moment(attempt.started)
        is_open = attempt.ended is None and begun is not None and last_sign is not None
        since = (last_sign - begun).total_seconds() if is_open and last_sign and begun else 0.0
        total += max(attempt.seconds or 0.0, since)
    return total if attempts else None


def _report(run: RunDir, kind: str) -> Entry:
    report, is_made = REPORTS[kind].load(run.report), not run.name.endswith(UNFINISHED)
    models = (report and report.models) or {}
    names = OF_ANSWERS if kind == "compare" else OF_HELD_OUT
    values = {
        name: {model: _number(getattr(of, name, None)) for model, of in models.items()} for name in names
    }
    is_running = not is_made and locking.is_held(run.path.with_name(kind))
    return Entry(
        recipe=run.recipe,
        name=run.name,
        stage=kind,
        outcome="running" if is_running else "finished" if is_made and models else "failed",
        path=run.path,
        when=written(run.report) or written(run.log) or written(run.path),
        size_bytes=size_bytes(run.path),
        held_out={name: of for name, of in values.items() if any(value is not None for value in of.values())},
        seconds=report.wall_seconds if report else None,
        made_from=list(models),
    )


def _number(measure: Any) -> float | None:
    value: float | None = getattr(measure, "value", measure)
    return value


def _export(recipe: str, folder: Path) -> Entry | None:
    """An export, or one that a process makes now; what a killed one left is none."""
    built, mark = BUILT.fullmatch(folder.name), read_mark(folder)
    is_running = bool(built and locking.is_held(folder.with_name(built[1])))
    if folder.name.startswith(".") and not is_running:
        return None
    return Entry(
        recipe=recipe,
        name=f"{EXPORT}/{folder.name}",
        stage=EXPORT,
        outcome="running" if is_running else "finished" if mark else "failed",
        path=folder,
        when=written(folder / MARK) or written(folder),
        size_bytes=size_bytes(folder),
        made_from=[mark.stage] if mark and mark.stage else [],
    )
