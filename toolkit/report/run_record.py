"""What one stage run has left on disk, as far as it came: read without torch, whatever ended the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from toolkit.report.curves import Series
from toolkit.run.rundir import ANSWERS, EVENTS, PREFIX, RunDir

Outcome = Literal["finished", "running", "interrupted", "failed", "killed"]

NUM_EVENTS = 1000  # enough for any reader; a run that recovers at every step has more

# What report.json holds of every run, whatever ended it; null where nothing is known.
REPORT_KEYS = (
    "stage",
    "outcome",
    "reason",
    "recipe",
    "device",
    "num_steps",
    "wall_seconds",
    "train_seconds",
    "train_tokens",
    "loss_first",
    "loss_last",
    "eval",
    "settings",
    "planned_peak_gib",
    "planned_items_gib",
    "measured_peak_gib",
    "checkpoint_seconds",
    "allocator",
    "probe",
    "oom_events",
    "reference",
    "answers",
    "notes",
)


@dataclass(frozen=True)
class RunRecord:
    """One stage run. `report` has all of REPORT_KEYS; `series` is metrics.jsonl, a column a name.

    `last_sign` is when the run last wrote anything, `total_steps` what it was to do, as far as a checkpoint tells.
    `others` are the reports of compare and eval of the same recipe, with the moment each was written.
    """

    run: RunDir
    outcome: Outcome
    manifest: dict[str, Any]
    report: dict[str, Any]
    series: dict[str, Series]
    data: dict[str, Any]
    events: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    last_sign: datetime | None
    sealed_step: int | None
    total_steps: int | None
    others: dict[str, tuple[dict[str, Any], datetime]]


def read(run: RunDir) -> RunRecord | None:
    """What there is of the run; None when it has not begun. Half-written and missing files count as absent."""
    manifest = run.read_manifest()
    if "outcome" not in manifest:
        return None
    series = read_series(run.metrics)
    outcome = _outcome(run, manifest)
    plan = manifest.get("plan") or {}
    known = measured(series) | {
        "stage": run.stage,
        "recipe": run.recipe,
        "settings": plan.get("settings"),
        "planned_peak_gib": plan.get("peak_gib"),
        "planned_items_gib": plan.get("items_gib"),
        "allocator": manifest.get("allocator"),
    }
    recorded = _read_json(run.report)
    if recorded.get("outcome") != outcome:
        recorded = {}  # of an earlier session
    report = dict.fromkeys(REPORT_KEYS) | known | {k: v for k, v in recorded.items() if v is not None}
    sealed = run.sealed_step()
    return RunRecord(
        run=run,
        outcome=outcome,
        manifest=manifest,
        report=report | {"outcome": outcome, "reason": manifest.get("reason")},
        series=series,
        data=_read_json(run.path / "data_report.json"),
        events=[event for event, _ in zip(_read_lines(run.path / EVENTS), range(NUM_EVENTS), strict=False)],
        answers=list(_read_lines(run.path / ANSWERS)),
        last_sign=_written(run.metrics) or _written(run.manifest),
        sealed_step=sealed,
        total_steps=_total_steps(run, sealed),
        others={name: found for name in ("compare", "eval") if (found := _other(run.of(name)))},
    )


def unfinished_report(run: RunDir, facts: dict[str, Any]) -> dict[str, Any]:
    """report.json of a run that was interrupted or failed: `facts`, and what its metrics tell."""
    events = list(_read_lines(run.path / EVENTS))
    known = measured(read_series(run.metrics)) | {
        "stage": run.stage,
        "recipe": run.recipe,
        "oom_events": events,
    }
    return dict.fromkeys(REPORT_KEYS) | known | facts


def read_series(metrics: Path) -> dict[str, Series]:
    """The columns of metrics.jsonl. A value that is not finite is None; a half-written line is passed over."""
    series: dict[str, Series] = {}
    for entry in _read_lines(metrics):
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
            column.values.append(value if value is None or math.isfinite(value) else None)
    return series


def measured(series: dict[str, Series]) -> dict[str, Any]:
    """The keys of report.json that the metrics tell."""
    losses = [value for value in series.get("loss", Series()).values if value is not None]
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
        "loss_last": losses[-1] if losses else None,
        "eval": evaluated or None,
        "measured_peak_gib": max(peaks, default=None),
    }


def _outcome(run: RunDir, manifest: dict[str, Any]) -> Outcome:
    recorded = manifest["outcome"]
    if recorded == "running" and not run.is_held():
        return "killed"
    return recorded if recorded in ("running", "finished", "interrupted") else "failed"


def _total_steps(run: RunDir, sealed: int | None) -> int | None:
    if sealed is None:
        return None
    state = _read_json(run.checkpoints / f"{PREFIX}{sealed}" / "trainer_state.json")
    return state.get("max_steps")


def _other(run: RunDir) -> tuple[dict[str, Any], datetime] | None:
    report, written = _read_json(run.report), _written(run.report)
    return (report, written) if isinstance(report.get("models"), dict) and written else None


def _written(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with stream:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value
