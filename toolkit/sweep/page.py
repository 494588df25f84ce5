"""A sweep as one HTML file: a figure a measure, a dot a seed; what differs by more than seeds do; every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from toolkit.console.panel import duration
from toolkit.recipe import stages
from toolkit.records.sweep_report import Sweep
from toolkit.report.html import document
from toolkit.report.tables import table
from toolkit.sweep.results import Compared, Result
from toolkit.sweep.table import interval, notes

STYLE = """
body { max-width: 64rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.15rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem 1.1rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); } td.n, th.n { text-align: right; white-space: nowrap; }
a { color: var(--accent); } .best { color: var(--good); font-weight: 600; } .worse { color: var(--bad); }
.noise { color: var(--quiet); }
svg { display: block; width: 100%; height: auto; margin: .4rem 0 .8rem; overflow: visible; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .tick { fill: var(--quiet); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .bar { stroke: var(--accent); stroke-width: 2; }
svg .seed { fill: var(--accent); opacity: .45; } svg .mean { fill: var(--accent); }
svg .first .bar { stroke: var(--good); } svg .first .mean, svg .first .seed { fill: var(--good); }
"""
WIDTH, LABELS, LINE = 960, 260, 30  # of a figure, in its own units
NUM_TICKS = 5


def page(sweep: Sweep, results: Sequence[Result], compared: Sequence[Compared]) -> str:
    """The whole file."""
    stage = stages.of(sweep.stage or "")
    varied = "".join(
        f"<li><code>{escape(path)}</code>: {escape(', '.join(map(str, values)))}</li>"
        for path, values in (sweep.varied or {}).items()
    )
    done = sum(result.outcome == "finished" for result in results)
    said = "".join(f"<p class='quiet'>{escape(note)}</p>" for note in notes(compared))
    body = (
        f"<h1>{escape(stage.title)} of {escape(sweep.recipe or '')}: {len(results)} runs</h1>"
        f"<p class='quiet'>{done} finished. Varied:</p><ul>{varied}</ul>{said}"
        + "".join(map(_measure, compared))
        + f"<h2>Every run</h2>{_runs(results, compared)}"
    )
    return document(f"{stage.label} sweep · {sweep.recipe}", body, STYLE)


def _measure(one: Compared) -> str:
    why = f"<p class='quiet'>Not compared: {escape(one.why)}.</p>" if one.why else ""
    head = ["runs", "seeds", "mean, 95 %", *(["less the best, 95 %", "is it noise?"] if one.best else [])]
    rows = [
        [
            escape(cell),
            str(mean.num),
            interval(one.field, mean),
            *(_against_best(one, cell) if one.best else []),
        ]
        for cell, mean in one.means.items()
    ]
    return f"<h2>Held-out {escape(one.field.label)}</h2>{why}{_figure(one)}{table(head, rows)}"


def _against_best(one: Compared, cell: str) -> list[str]:
    found, verdict, less = one.from_best.get(cell), one.verdict(cell), "-"
    if found:
        style = one.field.style
        ends = "" if math.isnan(found.low) else f" ({style.format(found.low)} to {style.format(found.high)})"
        less = f"{style.format(found.difference)}{ends}"
    return [less, f"<span class='{verdict.split()[0].strip(',')}'>{escape(verdict)}</span>"]


def _figure(one: Compared) -> str:
    """A line a cell: a dot for each seed, the mean with its interval over them."""
    shown = [value for of_cell in one.values.values() for value in of_cell.values()]
    shown += [end for mean in one.means.values() for end in (mean.low, mean.high) if not math.isnan(end)]
    low, high = min(shown), max(shown)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room

    def at(value: float) -> float:
        return LABELS + (value - low) / (high - low) * (WIDTH - LABELS - 20)

    height = LINE * len(one.means) + 28
    parts = []
    for number in range(NUM_TICKS):
        value = low + (high - low) * (number + 0.5) / NUM_TICKS
        x, text = at(value), one.field.style.format(value)
        parts.append(
            f"<line class='grid' x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 24}'/>"
            f"<text class='tick' x='{x:.1f}' y='{height - 6}' text-anchor='middle'>{text}</text>"
        )
    for number, (cell, mean) in enumerate(one.means.items()):
        y = LINE * (number + 0.5)
        bar = ""
        if not math.isnan(mean.low):
            bar = f"<line class='bar' x1='{at(mean.low):.1f}' x2='{at(mean.high):.1f}' y1='{y}' y2='{y}'/>"
        dots = "".join(
            f"<circle class='seed' cx='{at(value):.1f}' cy='{y}' r='4'><title>seed {escape(str(seed))}: "
            f"{one.field.style.format(value)}</title></circle>"
            for seed, value in one.values[cell].items()
        )
        x = at(mean.value)
        parts.append(
            f"<g class='{'first' * (cell == one.best)}'><text x='0' y='{y + 4}'>{escape(cell)}</text>{bar}{dots}"
            f"<rect class='mean' x='{x - 1.5:.1f}' y='{y - 9}' width='3' height='18'/></g>"
        )
    told = "; ".join(f"{cell}: {interval(one.field, mean)}" for cell, mean in one.means.items())
    return (
        f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(told)}'>{''.join(parts)}</svg>"
    )


def _runs(results: Sequence[Result], compared: Sequence[Compared]) -> str:
    fields = [one.field for one in compared]
    head = ["run", "outcome", *(f"held-out {field.label}" for field in fields), "steps", "time"]
    rows = []
    for result in results:
        name, place = escape(result.run.name), f"../../{escape(result.run.name)}/report.html"
        reason = f"<br><span class='quiet'>{escape(result.reason)}</span>" if result.reason else ""
        values = (result.held_out.get(field.key) for field in fields)
        rows.append(
            [
                f"<a href='{place}'>{name}</a>" if result.run.page.exists() else name,
                escape(result.outcome) + (reason if result.outcome != "finished" else ""),
                *(
                    "-" if value is None else field.style.format(value)
                    for field, value in zip(fields, values, strict=True)
                ),
                f"{result.num_steps:,}",
                duration(result.seconds) if result.seconds else "-",
            ]
        )
    return table(head, rows)
