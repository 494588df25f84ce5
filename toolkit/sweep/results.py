"""How the runs of a sweep came out: cells of runs that differ in their seed alone, and which cells differ by more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.evaluation import seeds
from toolkit.evaluation.seeds import SIGNIFICANT, Apart, BySeed, Mean
from toolkit.recipe import stages
from toolkit.recipe.stages import PanelField
from toolkit.records.sweep_report import Sweep
from toolkit.report import run_record
from toolkit.run.rundir import RunDir
from toolkit.sweep.points import SEED

LOWER_IS_BETTER = ("loss",)
# What a measure is made of beside the answers: cells that differ in one of these keys of their stage are not compared.
MADE_OF = {"loss": ("beta", "loss_type", "label_smoothing"), "rewards/margins": ("beta",)}


@dataclass(frozen=True)
class Result:
    """One run. `held_out` has the Trainer's own names, `rows` is the hash of its held-out rows."""

    run: RunDir
    values: dict[str, Any]
    outcome: str
    reason: str | None
    held_out: dict[str, float]
    rows: str | None
    num_steps: int
    seconds: float | None

    @property
    def cell(self) -> str:
        return cell_of(self.values)

    @property
    def seed(self) -> Any:
        return self.values.get(SEED)


@dataclass(frozen=True)
class Compared:
    """One measure over the cells. `best` is None where they cannot be compared, and `why` says so."""

    field: PanelField
    means: dict[str, Mean]
    values: dict[str, BySeed]
    best: str | None
    from_best: dict[str, Apart]
    why: str

    def verdict(self, cell: str) -> str:
        """Of a cell against the best one."""
        if self.best is None:
            return "-"
        if cell == self.best:
            return "best"
        found = self.from_best.get(cell)
        if found is None or math.isnan(found.p_value):
            return "no telling"
        return (
            f"worse, p {found.p_value:.2g}"
            if found.p_value < SIGNIFICANT
            else f"noise, p {found.p_value:.2g}"
        )


def read(root: Path, sweep: Sweep) -> list[Result]:
    """What lies on disk of each of its runs, in their order."""
    refused, found = sweep.refused or {}, []
    for name, values in (sweep.points or {}).items():
        run = RunDir(root, sweep.recipe or "", name)
        record = run_record.read(run)
        if record is None:
            outcome = "refused" if name in refused else "not begun"
            found.append(Result(run, values, outcome, refused.get(name), {}, None, 0, None))
            continue
        fields = [field.key for field in stages.of(name).panel_fields]
        known = {key: value for key in fields if (value := (record.report.eval or {}).get(key)) is not None}
        found.append(
            Result(
                run,
                values,
                record.outcome,
                refused.get(name, record.report.reason),
                {key: value for key, value in known.items() if math.isfinite(value)},
                (record.manifest.rows or {}).get("eval"),
                record.report.num_steps or 0,
                record.manifest.total_seconds,
            )
        )
    return found


def compare(stage: str, results: Sequence[Result]) -> list[Compared]:
    """Every held-out measure that the finished runs have."""
    done = [result for result in results if result.outcome == "finished"]
    fields = [
        field for field in stages.of(stage).panel_fields if any(field.key in one.held_out for one in done)
    ]
    return [_compared(stage, field, [one for one in done if field.key in one.held_out]) for field in fields]


def cell_of(values: Mapping[str, Any]) -> str:
    """`beta 0.1, learning_rate 5e-06`: all but the seed."""
    told = (f"{path.rpartition('.')[2]} {value}" for path, value in values.items() if path != SEED)
    return ", ".join(told) or "all seeds"


def _compared(stage: str, field: PanelField, done: Sequence[Result]) -> Compared:
    values: dict[str, dict[Any, float]] = {}
    for result in done:
        values.setdefault(result.cell, {})[result.seed] = result.held_out[field.key]
    means = {cell: seeds.mean(of_cell) for cell, of_cell in values.items()}
    if why := _why_not(stage, field, done):
        return Compared(field, means, dict(values), None, {}, why)
    sign = -1 if field.key in LOWER_IS_BETTER else 1
    best = max(means, key=lambda cell: sign * means[cell].value)
    from_best = {}
    for (later, earlier), found in seeds.differences(values).items():
        if best == later:  # said as the other one less the best
            from_best[earlier] = _turned(found)
        elif best == earlier:
            from_best[later] = found
    return Compared(field, means, dict(values), best, from_best, "")


def _turned(found: Apart) -> Apart:
    """The same difference, seen from the other side."""
    return found._replace(difference=-found.difference, low=-found.high, high=-found.low)


def _why_not(stage: str, field: PanelField, done: Sequence[Result]) -> str:
    """Why cells cannot be told apart by this measure; "" where they can."""
    if len({result.cell for result in done}) < 2:
        return "one kind of run: there is nothing to compare it with"
    made_of = {f"{stage}.{key}" for key in MADE_OF.get(field.key, ())}
    if varied := sorted(made_of & {path for result in done for path in result.values}):
        return (
            f"it is made of {', '.join(varied)}: another value of that gives another scale, not another model"
        )
    rows: dict[Any, set[str | None]] = {}
    for result in done:
        rows.setdefault(result.seed, set()).add(result.rows)
    if any(len(of_seed) > 1 for of_seed in rows.values()):
        return "the runs hold out different rows, so their values are of different things"
    if all(len(result_seeds) < 2 for result_seeds in _seeds(done).values()):
        return "one seed each: what a seed makes is not known; add --vary seed=1,2,3"
    return ""


def _seeds(done: Sequence[Result]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for result in done:
        found.setdefault(result.cell, set()).add(result.seed)
    return found
