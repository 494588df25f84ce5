"""The tables of a run's report as HTML: memory, rows, measures of the models; and how numbers are written there."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from toolkit.data.reasons import Reason
from toolkit.records.comparison_report import AnswerMeasures
from toolkit.records.data_report import DataReport, Rows
from toolkit.records.evaluation_report import Measure, ModelMeasures
from toolkit.records.run_report import PairScores, RunReport
from toolkit.report.run_record import RunRecord, is_of_other_weights

_SENTENCES = {reason.value: reason.sentence for reason in Reason}
SHOWN_GIB = 0.005  # what is less would read 0.00
OUTSIDE = ("context", "reserve")  # items of a plan that its peak does not hold
NOT_MEASURED = "Predicted. What was used is measured on a GPU only."
SHARES = ("fraction", "accuracy", "rate")  # a measure of such a name lies between 0 and 1


def number(value: Any, style: str) -> str | None:
    """A number in this format, None for whatever is none."""
    return style.format(value) if isinstance(value, (int, float)) else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already. Under a `head` all columns but the first are of numbers."""

    def cell(tag: str, place: int, html: str) -> str:
        return f'<{tag} class="n">{html}</{tag}>' if place and head else f"<{tag}>{html}</{tag}>"

    lines = ["".join(cell("th", place, title) for place, title in enumerate(head))] if head else []
    lines += ["".join(cell("td", place, html) for place, html in enumerate(row)) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _words(name: str) -> str:
    """A name of ours as a reader's words."""
    return escape(name.replace("_gib", ", GiB").replace("_", " "))


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def memory_section(report: RunReport) -> str:
    """What was planned, item by item, against what was measured."""
    items, planned = report.planned_items_gib or {}, report.planned_peak_gib
    if not planned:
        return ""
    measured, probe = report.measured_peak_gib, report.probe
    shown = {name: [_words(name), f"{gib:.2f}"] for name, gib in items.items() if gib >= SHOWN_GIB}
    rows = [cells for name, cells in shown.items() if name not in OUTSIDE]
    outside = [[f"beside it: {cells[0]}", cells[1]] for name in OUTSIDE if (cells := shown.get(name))]
    totals = [("planned peak", f"{planned:.2f}")]
    if probe and probe.peak_gib is not None:
        totals.append(("measured by the probe, longest rows together", f"{probe.peak_gib:.2f}"))
    if measured is not None:
        totals.append(("measured peak of the run", f"{measured:.2f}"))
        totals.append(("measured against planned", f"{measured / planned - 1:+.0%}"))
    rows += [[f"<b>{name}</b>", f"<b>{gib}</b>"] for name, gib in totals]
    about = "What is there at the moment of the peak." if measured is not None else NOT_MEASURED
    settings = report.settings or {}
    chosen = [[_words(name), number(value, "{:,}") or escape(str(value))] for name, value in settings.items()]
    return (
        f'<h2>Memory, planned and measured</h2><p class="quiet">{about}</p><div class="side">'
        f"<div>{table(['item', 'GiB'], rows + outside)}</div><div>{table(['setting', ''], chosen)}</div></div>"
    )


def data_section(data: DataReport | None) -> str:
    """What became of the rows, and how long they are."""
    if data is None:
        return ""
    parts = [_rows("Trained on", data, data.max_length)]
    if data.suggestion:
        parts[0] += f'<p class="quiet">{escape(data.suggestion)}</p>'
    if held_out := data.eval:
        about = f'<p class="quiet">{held_out.leaks:,} of them also in training.</p>' if held_out.leaks else ""
        parts.append(_rows("Held out", held_out, None) + about)
    sections = "".join(f"<section>{part}</section>" for part in parts)
    return f'<h2>Rows</h2><div class="side">{sections}</div>'


def _rows(title: str, data: Rows, max_length: int | None) -> str:
    steps = [[escape(step.step), f"{step.before:,}", f"{step.after:,}"] for step in data.selection or []]
    first_rows = data.first_rows or {}
    dropped = [
        [
            f"{escape(_SENTENCES.get(reason, reason))}<br>"
            f'<span class="quiet">rows {escape(_places(first_rows.get(reason, []), count))}</span>',
            f"{count:,}",
        ]
        for reason, count in (data.dropped or {}).items()
    ]
    if data.cut:
        at = f" at max_length {max_length:,}" if max_length else ""
        dropped.append([f"used, but cut{at}", f"{data.cut:,}"])
    lengths = data.lengths or {}
    columns = list(next(iter(lengths.values()), {}))
    sizes = [
        [escape(kind), *(number(of_kind.get(column), "{:,}") or "-" for column in columns)]
        for kind, of_kind in lengths.items()
    ]
    tokens, trained = data.tokens_per_epoch or 0, data.trained_tokens_per_epoch or 0
    return (
        f'<h3>{title}: {data.used or 0:,} of {data.read or 0:,} rows</h3><p class="quiet">'
        f"{tokens:,} tokens an epoch, {trained:,} of them trained</p>"
        + (
            table(["dropped because", "rows"], dropped)
            if dropped
            else '<p class="quiet">Nothing is dropped or cut.</p>'
        )
        + (table(["selected", "before", "after"], steps) if steps else "")
        + (table(["tokens a row", *map(escape, columns)], sizes) if sizes else "")
    )


def _places(places: Sequence[Any], count: int) -> str:
    return ", ".join(map(str, places)) + (", ..." if count > len(places) else "")


def scores_section(scores: PairScores | None) -> str:
    """How a reward model scores held-out pairs, by source too."""
    if scores is None:
        return ""
    if scores.note:
        return f'<h2>Held-out pairs</h2><p class="quiet">No scores: {escape(scores.note)}</p>'
    columns = {"all": scores, **(scores.by_source or {})}
    names = ("accuracy", "margin", "accuracy_chosen_shorter", "accuracy_chosen_longer", "length_correlation")
    rows = [
        [
            _words(name),
            *(_cell(_WRITTEN_AS.get(name, name), getattr(of, name, None)) for of in columns.values()),
        ]
        for name in names
    ]
    about = (
        "Accuracy: share of pairs whose chosen reply has the larger score. A score that goes with length alone is "
        "right where the chosen reply is the longer one, and wrong where it is the shorter."
    )
    return f'<h2>Held-out pairs</h2><p class="quiet">{about}</p>' + table(["", *map(escape, columns)], rows)


# Names of measures that lie between 0 and 1 and do not end so.
_WRITTEN_AS = {"accuracy_chosen_shorter": "accuracy", "accuracy_chosen_longer": "accuracy"}


def measures_section(record: RunRecord) -> str:
    """What compare and eval of the same recipe measured, one column a model, where they have run."""
    parts = []
    for name, (report, written) in record.others.items():
        models = {model: _measures(measures) for model, measures in (report.models or {}).items()}
        names = dict.fromkeys(measure for measures in models.values() for measure in measures)
        rows = [
            [
                escape(measure.replace("_", " ")),
                *(_cell(measure, measures.get(measure)) for measures in models.values()),
            ]
            for measure in names
        ]
        about = f"Of {written.day} {written:%b %Y, %H:%M} UTC" + (
            ": made before this run ended, so of other weights."
            if is_of_other_weights(written, record.manifest)
            else "."
        )
        if rows:
            parts.append(
                f'<h3>{name}</h3><p class="quiet">{about}</p>' + table(["", *map(escape, models)], rows)
            )
    return f"<h2>The models measured</h2>{''.join(parts)}" if parts else ""


def _measures(of_model: AnswerMeasures | ModelMeasures) -> dict[str, float | Measure]:
    """Those that have a value."""
    return {
        name: found
        for name, found in of_model.measures().items()
        if not isinstance(found, Measure) or found.value is not None
    }


def _cell(name: str, found: float | Measure | None) -> str:
    if isinstance(found, Measure):
        about = []
        if found.low is not None and found.high is not None:
            about.append(f"{_written(name, found.low)} to {_written(name, found.high)}")
        if found.num_rows is not None:
            about.append(f"{found.num_rows:,} rows")
        value = "-" if found.value is None else _written(name, found.value)
        return f'{value}<br><span class="quiet">{", ".join(about)}</span>'
    return "-" if found is None else _written(name, found)


def _written(name: str, value: float) -> str:
    if name.endswith(SHARES) and 0 <= value <= 1:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
