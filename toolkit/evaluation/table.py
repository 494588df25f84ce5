"""An evaluation on screen: measures with their intervals, a column a model, and what each stage changed, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.recipe import stages
from toolkit.records.evaluation_report import Evaluation, Measure, ModelMeasures, PairedMeasure, TaskMeasure
from toolkit.records.run_report import PairScores
from toolkit.report.measures import OF_HELD_OUT, OF_SCORES, Shown

Models = Mapping[str, ModelMeasures]

# A line of a table: its label, and how the measure of each model is shown.
Line = tuple[str, Sequence[tuple[Shown, Measure | TaskMeasure | None]]]
BESIDE = (  # in the report only
    "preference_log_loss",
    "overconfidence",
    "summed_likelihood_accuracy",
    "summed_likelihood_margin",
)
MEASURES = {name: how for name, how in OF_HELD_OUT.items() if name not in BESIDE}
LEGEND = (
    "[dim]loss: nats an assistant token. accuracy: held-out pairs whose chosen reply is preferred, by DPO's implicit "
    "reward or by log-likelihood a token. margin: how much more chosen gets than rejected.[/]"
)
WIDE = 110  # columns from which a value and its interval stand in one line


def show_evaluation(report: Evaluation, console: Console) -> None:
    """The tables, what each stage changed, and what was left out and why."""
    models = report.models or {}
    measured = _rows_of(models)
    if measured:
        console.print(_table("held-out rows, with 95 % intervals", models, measured, console))
        console.print(LEGEND)
    tasks = _task_rows(models)
    if tasks:
        console.print(_table("benchmarks, with standard errors", models, tasks, console))
    sources = _source_rows(models)
    if sources:
        console.print(_table("by source", models, sources, console))
    for line in (*difference_lines(report.paired or {}), *calibration_lines(models)):
        console.print(line)
    for what, reason in (report.left_out or {}).items():
        console.print(f"[yellow]{escape(what)} is left out:[/] {escape(reason)}")
    for note in report.notes or []:
        console.print(f"[yellow]{escape(note)}[/]")


def difference_lines(paired: Mapping[str, Mapping[str, PairedMeasure]]) -> list[str]:
    """One line a measure: which stage changed what by how much, or that no difference is shown."""
    lines = []
    for pair, measures in paired.items():
        one, other = map(stages.title, pair.split("_vs_"))
        for name, found in measures.items():
            if name in MEASURES:
                lines.append(f"[bold]{one} over {other}[/]: {MEASURES[name].label} {_said(name, found)}")
    return lines


def calibration_lines(models: Models) -> list[str]:
    """Whether the margins promise more, or less, than they keep."""
    lines = []
    for name, measures in models.items():
        error, found = measures.calibration_error, measures.overconfidence
        if error is not None and found is not None and _known(found.value) and _known(error.calibrated_high):
            value, low, high = (
                _signed(number, MEASURES["calibration_error"]) if _known(number) else "?"
                for number in (found.value, found.low, found.high)
            )
            shown = _known(found.low) and _known(found.high) and not found.low <= 0 <= found.high
            what = ("overconfident" if found.value > 0 else "underconfident") if shown else "neither shown"
            lines.append(
                f"[bold]{stages.title(name)}'s margins[/]: confidence less accuracy {value} points "
                f"\\[{low}, {high}]: {what}; margins that mean what they say stay below a calibration error of "
                f"{100 * error.calibrated_high:.1f}% on {error.num_rows or 0:,} pairs"
            )
    return lines


def score_lines(found: PairScores) -> list[str]:
    """One line a measure of a reward model on held-out pairs, with 95 % intervals, and one a source."""
    lines = [
        f"[bold]{how.label}[/] {_cell(how, measure, ' ')} [dim]{measure.num_rows or 0:,} pairs[/]"
        for name, how in OF_SCORES.items()
        if (measure := getattr(found, name)) is not None
    ]
    for source, scores in (found.by_source or {}).items():
        if scores.accuracy is not None:
            cell = _cell(OF_SCORES["accuracy"], scores.accuracy, " ")
            lines.append(f"  {escape(source)}: {cell} [dim]{scores.accuracy.num_rows or 0:,} pairs[/]")
    return lines


def _said(name: str, found: PairedMeasure) -> str:
    how, rows = MEASURES[name], f"{found.num_rows or 0:,} rows"
    difference, low, high, p_value = found.difference, found.low, found.high, found.p_value
    points = " points" if how.is_share else ""
    if not _known(difference):
        return f"nothing to say on {rows}"
    if not (_known(low) and _known(high) and _known(p_value)):
        return f"{_signed(difference, how)}{points} on {rows}: too few to say"
    chance = "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"
    ends = f"\\[{_signed(low, how)}, {_signed(high, how)}]"
    text = f"{_signed(difference, how)}{points} {ends}, {chance}, {rows}"
    if low <= 0 <= high:
        return f"{text}: no difference shown"
    return f"{text}: {'better' if difference * how.better > 0 else '[red]worse[/]'}"


def _rows_of(models: Models) -> list[Line]:
    """(label, the measure of each model) of the measures that any model has."""
    rows: list[Line] = []
    for name, how in MEASURES.items():
        found = [getattr(measures, name) for measures in models.values()]
        if any(found):
            rows.append((how.label, [(how, measure) for measure in found]))
    return rows


def _source_rows(models: Models) -> list[Line]:
    per_model = [measures.by_source or {} for measures in models.values()]
    rows: list[Line] = []
    for source in dict.fromkeys(source for sources in per_model for source in sources):
        rows.append((source, []))
        for name in ("loss", "preference_accuracy", "likelihood_accuracy"):
            found = [getattr(sources.get(source), name, None) for sources in per_model]
            if any(found):
                how = MEASURES[name]
                rows.append((f"  {how.label}", [(how, measure) for measure in found]))
    return rows


def _task_rows(models: Models) -> list[Line]:
    per_model = [measures.tasks or {} for measures in models.values()]
    metrics = dict.fromkeys(
        (task, metric) for tasks in per_model for task, metrics in tasks.items() for metric in metrics
    )
    how = Shown("", better=1)
    return [
        (f"{task} {metric}", [(how, tasks.get(task, {}).get(metric)) for tasks in per_model])
        for task, metric in metrics
    ]


def _table(title: str, models: Models, rows: list[Line], console: Console) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in models:
        table.add_column(stages.title(name), justify="right", no_wrap=True)
    table.add_column("rows", justify="right", style="dim")
    apart = " " if console.width >= WIDE else "\n"
    for label, cells in rows:
        if not cells:  # a heading
            table.add_row(f"[bold]{escape(label)}[/]")
            continue
        counts = [measure.num_rows for _, measure in cells if measure and measure.num_rows]
        table.add_row(
            escape(label),
            *(_cell(how, measure, apart) for how, measure in cells),
            f"{max(counts, default=0):,}",
        )
    return table


def _cell(how: Shown, measure: Measure | TaskMeasure | None, apart: str) -> str:
    if measure is None:
        return "[dim]-[/]"
    if not _known(measure.value):
        return "[red]NaN[/]"
    if isinstance(measure, TaskMeasure):
        error = "" if measure.stderr is None else f"{apart}[dim]± {how.text(measure.stderr)}[/]"
        return how.text(measure.value) + error
    low, high = measure.low, measure.high
    ends = "\\[?]"
    if _known(low) and _known(high):
        ends = f"\\[{how.text(low)}, {how.text(high)}]".replace("%", "")  # three of them in 80 columns
    return f"{how.text(measure.value)}{apart}[dim]{ends}[/]"


def _signed(value: float, how: Shown) -> str:
    return f"{100 * value:+.1f}" if how.is_share else f"{value:+#.3g}".rstrip(".")


def _known(value: float | None) -> TypeGuard[float]:
    """Whether there is a number: not one that could not be told, in memory or read back from JSON."""
    return value is not None and value == value
