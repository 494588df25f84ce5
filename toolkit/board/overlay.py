"""The curves of several runs in the same figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from toolkit.report import curves
from toolkit.report.curves import Chart, Curve, Series

MOST_RUNS = 8  # at one time: as many colours can be told apart
COLOURS = tuple(f"--run-{number}" for number in range(1, MOST_RUNS + 1))
# Where one curve of each run is enough for its figure.
ONE_OF_MANY = {curves.MEMORY.title: "vram_peak_gib"}


@dataclass(frozen=True)
class Overlay:
    """Figures, and the series that they draw by the keys of their curves."""

    charts: list[Chart]
    series: dict[str, Series]
    has_legends: bool  # what is chosen is one, where each run has one colour


def overlay(runs: Mapping[str, tuple[str, dict[str, Series]]]) -> Overlay:
    """`runs` has stage and series of each by its full name. One run has all of its curves; of several each figure has
    a curve a run, in the run's colour, and dashed that of its evaluations."""
    if len(runs) == 1:
        [(stage, series)] = runs.values()
        series = curves.without_ties(series)
        return Overlay(curves.charts(stage, series), series, has_legends=True)
    charts: dict[tuple[str, str], Chart] = {}
    drawn: dict[str, Series] = {}
    for colour, (name, (stage, own)) in zip(COLOURS, runs.items(), strict=False):
        own = curves.without_ties(own)
        for chart in curves.charts(stage, own):
            found = [_renamed(curve, name, colour) for curve in _shared(chart)]
            if not found:
                continue
            place = chart.title, chart.axis
            before = charts.get(place, replace(chart, curves=()))
            charts[place] = replace(before, curves=before.curves + tuple(curve for curve, _ in found))
            drawn |= {curve.key: own[key] for curve, key in found}
    return Overlay(list(charts.values()), drawn, has_legends=False)


def _shared(chart: Chart) -> list[Curve]:
    """What is drawn of a chart for each of several runs: a curve and its evaluations; [] where that says too little."""
    if chart.title in ONE_OF_MANY:
        return [curve for curve in chart.curves if curve.key == ONE_OF_MANY[chart.title]]
    logged = [curve for curve in chart.curves if not curve.key.startswith("eval_")]
    evaluated = [curve for curve in chart.curves if curve.key.startswith("eval_")]
    return [] if len(logged) > 1 or len(evaluated) > 1 else [*logged, *evaluated]


def _renamed(curve: Curve, run: str, colour: str) -> tuple[Curve, str]:
    """The curve as one of a run, and the key of its series in the run."""
    label = f"{run}, evaluation" if curve.key.startswith("eval_") else run
    return replace(curve, label=label, key=f"{run} {curve.key}", colour=colour), curve.key
