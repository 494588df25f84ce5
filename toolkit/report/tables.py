"""The tables of a run's report as HTML: memory, rows, measures of the models; and how numbers are written there."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from toolkit.data.reasons import Reason
from toolkit.memory.listing import listing
from toolkit.records.comparison_report import Comparison
from toolkit.records.data_report import DataReport, Rows
from toolkit.records.evaluation_report import Measure
from toolkit.records.run_report import PairScores, RunReport
from toolkit.report.measures import OF_HELD_OUT, OF_SCORES, Shown, answer_rows
from toolkit.report.run_record import Others, RunRecord, is_of_other_weights

_SENTENCES = {reason.value: reason.sentence for reason in Reason}
SETTINGS = {  # fields of `memory.phases.Settings` in a reader's words
    "per_device_train_batch_size": "rows in a micro-batch",
    "gradient_accumulation_steps": "micro-batches in a step",
    "tokens_per_micro_batch": "tokens in a micro-batch, at most",
    "recompute_layers": "layers that recompute",
    "loss_chunk_gib": "chunk of the loss, GiB",
}
NOT_MEASURED = "Predicted. What was used is measured on a GPU only."


def number(value: Any, style: str) -> str | None:
    """A number in this format, None for whatever is none."""
    return style.format(value) if isinstance(value, (int, float)) else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already. Under a `head` all columns but the first are of numbers."""

    def cell(tag: str, place: int, html: str) -> str:
        number, scope = ' class="n"' * bool(place and head), ' scope="col"' * (tag == "th")
        return f"<{tag}{number}{scope}>{html}</{tag}>"

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
    listed = listing(items)
    rows = [[_words(name), gib] for name, gib in listed.inside]
    outside = [[f"beside it: {_words(name)}", gib] for name, gib in listed.outside]
    totals = [("planned peak", f"{planned:.2f}")]
    if probe and probe.peak_gib is not None:
        totals.append(("measured by the probe, longest rows together", f"{probe.peak_gib:.2f}"))
    if measured is not None:
        totals.append(("measured peak of the run", f"{measured:.2f}"))
        totals.append(("measured against planned", f"{measured / planned - 1:+.0%}"))
    rows += [[f"<b>{name}</b>", f"<b>{gib}</b>"] for name, gib in totals]
    about = "What is there at the moment of the peak." if measured is not None else NOT_MEASURED
    settings = report.settings or {}
    chosen = [
        [SETTINGS.get(name) or _words(name), number(value, "{:,}") or escape(str(value))]
        for name, value in settings.items()
        if value is not None
    ]
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


def classes_section(balance: dict[str, Any] | None) -> str:
    """The good and the bad replies of KTO, and how much each counts."""
    if not balance:
        return ""
    rows = [
        [
            name,
            number(balance.get(name), "{:,}") or "-",
            number(balance.get(f"{name}_weight"), "{:.4g}") or "-",
        ]
        for name in ("desirable", "undesirable")
    ]
    return "<h2>Classes</h2>" + table(["", "rows", "weight of the loss"], rows)


def scores_section(scores: PairScores | None) -> str:
    """How a reward model scores held-out pairs, by source too."""
    if scores is None:
        return ""
    if scores.note:
        return f'<h2>Held-out pairs</h2><p class="quiet">No scores: {escape(scores.note)}</p>'
    columns = {"all": scores, **(scores.by_source or {})}
    rows = [
        [how.label, *(_cell(how, getattr(of, name, None)) for of in columns.values())]
        for name, how in OF_SCORES.items()
    ]
    about = (
        "Accuracy: share of pairs whose chosen reply has the larger score. A score that goes with length alone is "
        "right where the chosen reply is the longer one, and wrong where it is the shorter."
    )
    return f'<h2>Held-out pairs</h2><p class="quiet">{about}</p>' + table(["", *map(escape, columns)], rows)


def measures_section(record: RunRecord) -> str:
    """What compare and eval of the same recipe measured, one column a model, where they have run."""
    parts = []
    for report, written in record.others.values():
        title, head, rows = _measured(report)
        about = f"Of {written.day} {written:%b %Y, %H:%M} UTC" + (
            ": made before this run ended, so of other weights."
            if is_of_other_weights(written, record.manifest)
            else "."
        )
        if rows:
            parts.append(f'<h3>{title}</h3><p class="quiet">{about}</p>' + table(head, rows))
    return f"<h2>The models measured</h2>{''.join(parts)}" if parts else ""


def _measured(report: Others) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and rows of a table, in the words of comparison.html and run_eval.py."""
    head = ["", *map(escape, report.models or {})]
    if isinstance(report, Comparison):
        shown = answer_rows(report.models or {})
        return "Their answers", head, [[escape(label), *cells] for label, cells in shown]
    rows = []
    for name, how in OF_HELD_OUT.items():
        found = [getattr(of_model, name, None) for of_model in (report.models or {}).values()]
        known = [measure for measure in found if measure and measure.value is not None]
        if known:
            num_rows = max(measure.num_rows or 0 for measure in known)
            rows.append([how.label, *(_cell(how, measure) for measure in found), f"{num_rows:,}"])
    return "Held-out rows, with 95% intervals", [*head, "rows"], rows


def _cell(how: Shown, found: Measure | None) -> str:
    if found is None or found.value is None:
        return "-"
    value = how.text(found.value)
    if found.low is None or found.high is None:
        return value
    return f'{value}<br><span class="quiet">{how.text(found.low)} to {how.text(found.high)}</span>'
