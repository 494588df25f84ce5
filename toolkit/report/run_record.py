"""What one stage run has left on disk, as far as it came: read without torch, whatever ended the run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from toolkit.records.comparison_report import Comparison
from toolkit.records.data_report import DataReport
from toolkit.records.evaluation_report import Evaluation
from toolkit.records.record import read_lines, read_object
from toolkit.records.run_manifest import Manifest, PlanMade
from toolkit.records.run_report import RunReport
from toolkit.report.curves import Series
from toolkit.run.rundir import ANSWERS, COMPLETIONS, EVENTS, PREFIX, RunDir

Outcome = Literal["finished", "running", "interrupted", "failed", "killed"]

NUM_EVENTS = 1000  # enough for any reader; a run that recovers at every step has more

Others = Comparison | Evaluation


@dataclass(frozen=True)
class RunRecord:
    """One stage run. `series` is metrics.jsonl, a column a name; `data` is None where no row was prepared yet.

    `last_sign` is when the run last wrote anything, `total_steps` what it was to do, as far as a checkpoint tells.
    `others` are the reports of compare and eval of the same recipe, with the moment each was written. `notes` say
    which files are of another version of the toolkit, a line each.
    """

    run: RunDir
    outcome: Outcome
    manifest: Manifest
    report: RunReport
    series: dict[str, Series]
    data: DataReport | None
    events: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    last_sign: datetime | None
    sealed_step: int | None
    total_steps: int | None
    others: dict[str, tuple[Others, datetime]]
    notes: list[str]


def read(run: RunDir) -> RunRecord | None:
    """What there is of the run; None when it has not begun. Half-written and missing files count as absent."""
    notes: list[str] = []
    manifest = run.read_manifest(notes)
    if manifest.outcome is None:
        return None
    series = read_series(run.metrics)
    outcome = outcome_of(run, manifest.outcome)
    sealed = run.sealed_step()
    return RunRecord(
        run=run,
        outcome=outcome,
        manifest=manifest,
        report=_report(run, manifest, outcome, series, notes),
        series=series,
        data=DataReport.load(run.data_report, notes),
        events=[event for event, _ in zip(read_lines(run.path / EVENTS), range(NUM_EVENTS), strict=False)],
        answers=list(read_lines(run.path / ANSWERS)),
        completions=list(read_lines(run.path / COMPLETIONS)),
        last_sign=written(run.metrics) or written(run.manifest),
        sealed_step=sealed,
        total_steps=_total_steps(run, sealed),
        others=_others(run, notes),
        notes=notes,
    )


def unfinished_report(run: RunDir, facts: dict[str, Any]) -> RunReport:
    """report.json of a run that was interrupted or failed: `facts`, and what its metrics tell."""
    known = measured(read_series(run.metrics))
    events = list(read_lines(run.path / EVENTS))
    return replace(RunReport.unknown(), **known | {"oom_events": events} | facts)


def read_series(metrics: Path, last_bytes: int | None = None) -> dict[str, Series]:
    """The columns of metrics.jsonl, or of its end. What is not finite is None; a half-written line is passed over."""
    series: dict[str, Series] = {}
    add_entries(series, read_lines(metrics, last_bytes))
    return series


def add_entries(series: dict[str, Series], entries: Iterable[dict[str, Any]]) -> None:
    """Puts logs behind those that the columns have."""
    for entry in entries:
        step = entry.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in entry.items():
            if value is not None and not isinstance(value, (int, float)):
                continue
            column = series.get(name)
            if column is None:
                column = series[name] = Series()
            column.steps.append(step)
            column.values.append(value if value is None or abs(value) <= sys.float_info.max else None)


def measured(series: dict[str, Series]) -> dict[str, Any]:
    """The fields of report.json that the metrics tell."""
    logged = series.get("loss", Series()).values
    losses = [value for value in logged if value is not None]
    tokens = [value for value in series.get("num_tokens", Series()).values if value is not None]
    peaks = [value for value in series.get("vram_peak_gib", Series()).values if value is not None]
    evaluated = {
        name.removeprefix("eval_"): column.values[-1]
        for name, column in series.items()
        if name.startswith("eval_")
    }
    return {
        "num_steps": max((column.steps[-1] for column in series.values()), default=0),
        "train_tokens": int(tokens[-1]) if tokens else None,
        "loss_first": losses[0] if losses else None,
        "loss_last": logged[-1]
        if logged
        else None,  # also where that is no number: not the last that was one
        "eval": evaluated or None,
        "measured_peak_gib": max(peaks, default=None),
    }


def written(path: Path) -> datetime | None:
    """When a file was last written; None when there is none."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def moment(text: str | None) -> datetime | None:
    """A manifest's time, where it is one with its zone."""
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found if found and found.tzinfo else None


def is_of_other_weights(measured_at: datetime, manifest: Manifest) -> bool:
    """Whether measures of a model were written before the run that made it ended."""
    return manifest.ended is not None and measured_at.isoformat() < manifest.ended


def _report(
    run: RunDir, manifest: Manifest, outcome: Outcome, series: dict[str, Series], notes: list[str]
) -> RunReport:
    """report.json where it is of this session, and what manifest and metrics tell where it says nothing."""
    plan = manifest.plan or PlanMade.unknown()
    known = measured(series) | {
        "stage": run.stage,
        "recipe": run.recipe,
        "settings": plan.settings,
        "planned_peak_gib": plan.peak_gib,
        "planned_items_gib": plan.items_gib,
        "allocator": manifest.allocator,
    }
    said: list[str] = []
    recorded = RunReport.load(run.report, said)
    if recorded is None:
        notes += said
    elif recorded.outcome == outcome:
        notes += said
        fields = {field.name: getattr(recorded, field.name) for field in dataclasses.fields(recorded)}
        known |= {name: value for name, value in fields.items() if value is not None}
    return replace(RunReport.unknown(), **known | {"outcome": outcome, "reason": manifest.reason})


def outcome_of(run: RunDir, recorded: str) -> Outcome:
    """How a run ended; one that says it runs was killed where no process holds it."""
    if recorded == "running" and not run.is_held():
        return "killed"
    for outcome in ("running", "finished", "interrupted"):
        if recorded == outcome:
            return outcome
    return "failed"


def _total_steps(run: RunDir, sealed: int | None) -> int | None:
    """What the Trainer's own state says, in the newest complete checkpoint."""
    if sealed is None:
        return None
    steps = read_object(run.checkpoints / f"{PREFIX}{sealed}" / "trainer_state.json").get("max_steps")
    return steps if isinstance(steps, int) else None


def _others(run: RunDir, notes: list[str]) -> dict[str, tuple[Others, datetime]]:
    kinds: dict[str, type[Others]] = {"compare": Comparison, "eval": Evaluation}
    found = {}
    for name, kind in kinds.items():
        file = run.of(name).report
        report, moment = kind.load(file, notes), written(file)
        if report is not None and report.models is not None and moment is not None:
            found[name] = (report, moment)
    return found
