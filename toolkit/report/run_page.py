"""One stage run as one HTML file: how it went, its curves, its rows, its answers, how it was made."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.records.record import read_object
from toolkit.records.run_report import Answers
from toolkit.report import completions, curves, figures, proofs, run_record
from toolkit.report.headline import headline, tiles
from toolkit.report.html import document
from toolkit.report.run_record import RunRecord
from toolkit.report.tables import (
    classes_section,
    data_section,
    folded,
    measures_section,
    memory_section,
    scores_section,
    table,
)
from toolkit.run.rundir import RunDir

STYLE = """
:root { --curve-1: #0b5cad; --curve-2: #c2570c; --curve-3: #a3338b; }
@media (prefers-color-scheme: dark) { :root { --curve-1: #6cb2f8; --curve-2: #f5a45d; --curve-3: #e58bd2; } }
body { max-width: 72rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h2 + .quiet { margin-bottom: .8rem; }
h3 { font-size: .95rem; margin: 0; }
code { font: .85em ui-monospace, monospace; background: var(--panel); padding: .1rem .3rem; border-radius: .25rem;
  overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .9rem; }
.outcome { margin: 1rem 0; padding: .8rem 1rem; border-left: .3rem solid var(--tone); border-radius: .25rem;
  background: var(--panel); overflow-wrap: anywhere; }
.outcome b { color: var(--tone); font-size: 1.1rem; }
.reason { white-space: pre-wrap; }
.finished { --tone: var(--good); } .running { --tone: var(--accent); } .interrupted { --tone: var(--warn); }
.failed, .killed { --tone: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin: 0; }
.tiles div { padding: .6rem .8rem; background: var(--panel); border-radius: .35rem; }
.tiles dt, .tiles .quiet { color: var(--quiet); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd.quiet { font-weight: 400; }
.note { margin: .6rem 0; color: var(--warn); font-size: .9rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 1.25rem; }
.charts > * { min-width: 0; }
.charts > :first-child { grid-column: 1 / -1; }
.charts summary { font-size: .9rem; color: var(--quiet); } .charts .wide { max-height: 20rem; overflow: auto; }
.zoom { display: flex; gap: .5rem; margin-bottom: 1rem; }
.zoom button { font: inherit; font-size: .9rem; color: inherit; background: var(--panel); cursor: pointer;
  border: 1px solid var(--line); border-radius: .35rem; padding: .2rem .7rem; }
.zoom button:hover { border-color: var(--accent); }
.marks { margin: .5rem 0 1.2rem; padding-left: 1.1rem; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); }
td.n, th.n { text-align: right; white-space: nowrap; }
.wide + h3 { margin-top: 1.5rem; }
.side { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 2rem; }
.side > * { min-width: 0; }
article { margin: 0 0 1.25rem; }
article > h3 { margin-bottom: .4rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.pair > div { min-width: 0; padding: .6rem .8rem; background: var(--panel); border-radius: .35rem; }
.pair p { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.endless { color: var(--warn); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
details td { overflow-wrap: anywhere; } details td:first-child { white-space: nowrap; color: var(--quiet); }
pre { overflow-x: auto; padding: .8rem; background: var(--panel); border-radius: .35rem; font-size: .82rem; }
@media (max-width: 50rem) {
  body { padding: 1rem .8rem 3rem; } .charts, .side, .pair { grid-template-columns: 1fr; }
  details td:first-child { white-space: normal; }
}
"""
ZOOM = (
    '<div class="zoom" role="group" aria-label="zoom of all figures"><button data-zoom=".5">zoom in</button>'
    '<button data-zoom="2">zoom out</button><button data-zoom="0">show all</button></div>'
)
NUM_LISTED = 20  # of what happened on the way


def write(run: RunDir, notes: list[str] | None = None) -> Path | None:
    """Writes report.html of a run from what lies on disk; None when the run has not begun. Needs no torch.

    `notes` is given a line for each file that another version of the toolkit wrote; the page has them too.
    """
    record = run_record.read(run)
    if record is None:
        return None
    if notes is not None:
        notes += record.notes
    try:
        write_text(run.page, page(record, _text(run.page)))
    except OSError as error:
        raise UserError(f"cannot write {run.page}: {error.strerror}") from None
    return run.page


def page(record: RunRecord, earlier: str = "") -> str:
    """The whole file. `earlier` is the page as it was; see `figures.draw`."""
    series = curves.with_planned_peak(record.series, record.report.planned_peak_gib)
    series = curves.without_ties(series)
    charts = curves.charts(record.run.stage, series)
    marks = _marks(record)
    drawn = figures.draw(charts, series, [step for step, _ in marks], earlier)
    body = "\n".join(
        [
            headline(record),
            tiles(record),
            _curves(record, charts, series, drawn.divs, marks),
            completions.section(record),
            _answers(record),
            scores_section(record.report.scores),
            measures_section(record),
            proofs.section(record.report),
            classes_section(record.report.class_balance),
            memory_section(record.report),
            data_section(record.data),
            _made(record),
            drawn.script,
        ]
    )
    return document(f"{record.run.name} · {record.run.recipe} · {record.outcome}", body, STYLE, scripts=True)


def _marks(record: RunRecord) -> list[tuple[int, str]]:
    """Steps at which something happened, and what, in their order."""
    resumed = [(step, "continued from a checkpoint") for step in record.manifest.resumed_at_steps or []]
    events = []
    for event in record.events:
        step = event.get("step")
        what = f"out of memory ({event.get('where')}): {event.get('action')}"
        events.append((step if isinstance(step, int) else 0, what))
    return sorted(resumed + events)


def _curves(
    record: RunRecord,
    charts: list[curves.Chart],
    series: dict[str, curves.Series],
    divs: list[str],
    marks: list[tuple[int, str]],
) -> str:
    if not charts:
        return '<h2>Curves</h2><p class="quiet">No step was logged: there is nothing to draw.</p>'
    parts = [
        f'<section><h3>{chart.title}</h3><p class="quiet">{_about(chart, series) or "&nbsp;"}</p>'
        f'<div role="img" aria-label="{escape(curves.described(chart, series))}">{div}</div>'
        f"{folded('Values', _values(chart, series))}</section>"
        for chart, div in zip(charts, divs, strict=True)
    ]
    if not any(chart.title == curves.MEMORY.title for chart in charts):
        parts.append(
            '<section><h3>GPU memory</h3><p class="quiet">No GPU took part: there is nothing to show.</p></section>'
        )
    happened = "".join(f"<li>Step {step:,}: {escape(what)}</li>" for step, what in marks[:NUM_LISTED])
    if len(marks) > NUM_LISTED:
        happened += f"<li>and {len(marks) - NUM_LISTED:,} more</li>"
    listed = f'<p>Dotted lines:</p><ul class="marks">{happened}</ul>' if marks else ""
    return (
        f'<h2>Curves</h2><p class="quiet">{_how_to_read(charts, series)}</p>{ZOOM}'
        f'{listed}<div class="charts">{"".join(parts)}</div>'
    )


def _how_to_read(charts: list[curves.Chart], series: dict[str, curves.Series]) -> str:
    most = max(len(series[curve.key]) for chart in charts for curve in chart.curves)
    text = (
        "Drag over a stretch to zoom in, turn the wheel with Ctrl held, or move two fingers apart; all figures follow. "
        "A click in a legend hides a curve."
    )
    if any(curve.key.startswith("eval_") for chart in charts for curve in chart.curves):
        text += " Diamonds and dashes are evaluations on held-out rows."
    if most > curves.NUM_POINTS:
        text += f" Of {most:,} values a curve shows the lowest and the highest of each stretch."
    return text


def _values(chart: curves.Chart, series: dict[str, curves.Series]) -> str:
    """The figure as a table."""
    rows = [
        [f"{step:,}", *("-" if value is None else chart.style.plain.format(value) for value in values)]
        for step, values in curves.tabled(chart, series)
    ]
    return table(["step", *(escape(curve.label) for curve in chart.curves)], rows)


def _about(chart: curves.Chart, series: dict[str, curves.Series]) -> str:
    """What the figure shows, and what was done to its points so that they could be drawn."""
    longest = max((series[curve.key] for curve in chart.curves), key=len)
    notes = [chart.about] if chart.about else []
    if chart.mean and (stretch := curves.num_in_mean(len(longest))) > 1:
        notes.append(f"strong line: mean of {stretch:,} values")
    missing = sum(value is None for curve in chart.curves for value in series[curve.key].values)
    if missing:
        notes.append(f"{missing:,} {'value was' if missing == 1 else 'values were'} not finite")
    return "; ".join(notes)


def _answers(record: RunRecord) -> str:
    if record.outcome != "finished":
        return ""
    asked = record.report.answers or Answers.unknown()
    if not record.answers:
        return f'<h2>Answers</h2><p class="quiet">None: {escape(asked.note)}</p>' if asked.note else ""
    before, after = asked.before or "before", asked.after or "after"
    articles = "".join(
        f'<article><h3>{escape(str(row.get("prompt") or ""))}</h3><div class="pair">'
        f"{_answer(before, row.get('before'))}{_answer(after, row.get('after'))}</div></article>"
        for row in record.answers
    )
    return (
        "<h2>Answers before and after</h2>"
        f'<p class="quiet">The prompts of the recipe, answered greedily.</p>{articles}'
    )


def _answer(name: str, found: Any) -> str:
    answer = found if isinstance(found, dict) else {}
    count = answer.get("num_tokens")
    tokens = count if isinstance(count, int) else 0
    how = "" if answer.get("ended") else ' · <span class="endless">no end-of-turn token</span>'
    text = escape(str(answer.get("text") or "")) or '<span class="quiet">(empty)</span>'
    size = f"{tokens:,} token{'s' * (tokens != 1)}"
    return f'<div><span class="quiet">{escape(name)} · {size}{how}</span><p>{text}</p></div>'


def _made(record: RunRecord) -> str:
    """The manifest and the recipe, folded."""
    stored = read_object(record.run.manifest)  # with whatever another version wrote
    facts = {key: value for key, value in stored.items() if key not in ("trajectory", "plan")}
    rows = [[escape(name), escape(value)] for name, value in _flat(facts)]
    recipe = _text(record.run.path / "recipe.resolved.yaml")
    return (
        "<h2>How it was made</h2>"
        + folded("Manifest: command, code, packages, machine", table([], rows))
        + (folded("Recipe, every value", f"<pre>{escape(recipe)}</pre>") if recipe else "")
    )


def _text(file: Path) -> str:
    """What a file holds; "" where that cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _flat(node: Any, path: str = "") -> list[tuple[str, str]]:
    """A tree as lines: dotted path and value."""
    if isinstance(node, dict):
        return [
            line
            for key, value in node.items()
            for line in _flat(value, f"{path} · {key}" if path else str(key))
        ]
    if isinstance(node, list):
        return [(path, ", ".join(map(str, node)) or "-")]
    return [(path, "-" if node is None else f"{node:.2f}" if isinstance(node, float) else str(node))]
