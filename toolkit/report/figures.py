"""Curves as figures that can be zoomed and read, drawn by Bokeh; imported only when there is something to draw."""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.report import curves
from toolkit.report.curves import Chart, Curve, Point, Series, means, num_in_mean, thinned

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

SCRIPT = Path(__file__).with_suffix(".js")
HEIGHT_PIXELS = 280
NUM_MARKERS = 30  # up to so many points are worth a dot each
SIZES = {"circle": 5, "diamond": 10}  # pixels
WHOLE = (-0.02, 1.02)  # the axis of a share: 0 to 100 %, with room for a dot on either end
MEANS = " · mean"  # ends the name of the source that holds a curve's means
NUM_MARKS = 100  # vertical lines in a figure
FONT = "system-ui, sans-serif"
LEGEND: dict[str, Any] = {
    "location": "left",
    "background_fill_color": None,
    "border_line_color": None,
    "inactive_fill_color": None,
    "label_text_font": FONT,
    "label_text_font_size": "12px",
    "margin": 0,
    "padding": 2,
    "spacing": 12,
}
# Bokeh's toolbar and tooltips are white boxes, out of reach of a page's style sheet; custom properties reach them.
TOOLBAR = ":host(.bk-inner) { background: transparent; }"
TIP = (
    "margin: -6px; padding: .2rem .5rem; background: var(--paper); color: var(--ink); border: 1px solid var(--line); "
    "border-radius: .25rem; font: .8rem system-ui, sans-serif"
)


@dataclass(frozen=True)
class Drawn:
    """HTML to put into a page: `script` once, after all of `divs`, one for each chart."""

    script: str
    divs: list[str]


def draw(
    charts: Sequence[Chart], series: dict[str, Series], marks: Sequence[int], earlier: str = ""
) -> Drawn:
    """The charts as figures that zoom along the steps together. `marks` are steps where something happened.

    `earlier` is the page as it was written before: figures of the very same are taken from there, and Bokeh, a second
    of import, is left alone. The script brings it along (1.3 MB) and gives the figures the page's colours.
    """
    if not charts:
        return Drawn("", [])
    key = _key(charts, series, marks)
    parts = re.findall(f"<!--{key}-->(.*?)<!--/{key}-->", earlier, re.DOTALL)
    if len(parts) != len(charts) + 1:
        parts = _drawn(charts, series, marks)
    *divs, script = (f"<!--{key}-->{part}<!--/{key}-->" for part in parts)
    return Drawn(script, divs)


def _key(charts: Sequence[Chart], series: dict[str, Series], marks: Sequence[int]) -> str:
    """Of everything that decides what is drawn."""
    found = hashlib.sha256(repr((version("bokeh"), charts, marks)).encode())
    for file in (Path(__file__), SCRIPT, Path(curves.__file__)):
        found.update(file.read_bytes())
    for curve in (curve for chart in charts for curve in chart.curves):
        steps, values = series[curve.key].steps, series[curve.key].values
        found.update(array("q", steps))
        found.update(array("d", (math.nan if value is None else value for value in values)))
    return found.hexdigest()[:16]


def library() -> str:
    """Bokeh's script, 1.3 MB."""
    from bokeh.resources import Resources

    return str(Resources(mode="inline", components=["bokeh"]).js_raw[0])


def spanned(charts: Sequence[Chart], series: dict[str, Series]) -> tuple[float, float]:
    """The steps from end to end, with some room."""
    drawn = [series[curve.key].steps for chart in charts for curve in chart.curves]
    first, last = min(steps[0] for steps in drawn), max(steps[-1] for steps in drawn)
    room = max((last - first) * 0.02, 0.5)
    return first - room, last + room


def _drawn(charts: Sequence[Chart], series: dict[str, Series], marks: Sequence[int]) -> list[str]:
    """A div for each chart, and last the script."""
    from bokeh.embed import components
    from bokeh.models import Range1d

    shared = Range1d(*spanned(charts, series), bounds="auto")
    script, divs = components(in_a_document([figure_of(chart, series, shared, marks) for chart in charts]))
    ours = SCRIPT.read_text(encoding="utf-8")
    return [*divs, f"<script>{library()}</script>{script}<script>{ours}</script>"]


def in_a_document(plots: list[figure]) -> list[figure]:
    """The same, which Bokeh then writes in half the time."""
    from bokeh.document import Document

    document = Document()
    with document.models.freeze():  # else every plot is a walk through all of them
        for plot in plots:
            document.add_root(plot)
    return plots


def figure_of(
    chart: Chart, series: dict[str, Series], steps: Range1d, marks: Sequence[int], legend: bool = True
) -> figure:
    from bokeh.models import (
        DataRange1d,
        Legend,
        LegendItem,
        NumeralTickFormatter,
        PrintfTickFormatter,
        Range1d,
        Span,
        WheelZoomTool,
    )
    from bokeh.plotting import figure

    plot = figure(
        height=HEIGHT_PIXELS,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=Range1d(*WHOLE) if chart.is_share else DataRange1d(only_visible=True),
        window_axis="x",
        tools="xpan,box_zoom,reset,save",
        active_drag="box_zoom",
        toolbar_location="above",
        toolbar_inner=True,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.add_tools(wheel := WheelZoomTool(dimensions="width", modifiers={"ctrl": True}))
    plot.toolbar.active_scroll = wheel  # without Ctrl the wheel scrolls the page
    plot.toolbar.update(logo=None, autohide=True, stylesheets=[TOOLBAR])
    items = [
        LegendItem(label=curve.label, renderers=_lines(plot, chart, curve, series[curve.key]))
        for curve in chart.curves
    ]
    if legend and (len(items) > 1 or chart.curves[0].label != chart.title.lower()):
        num_columns = 2 if len(items) > 2 else len(items)
        plot.add_layout(Legend(items=items, click_policy="hide", ncols=num_columns, **LEGEND), "above")
    for step in sorted(marks)[:NUM_MARKS]:
        plot.add_layout(Span(location=step, dimension="height", line_dash="dotted", tags=["--warn"]))
    for axis in (plot.xaxis[0], plot.yaxis[0]):
        axis.update(axis_line_color=None, major_tick_line_color=None, minor_tick_line_color=None)
        axis.update(major_label_text_font=FONT, major_label_text_font_size="12px")
        axis.update(
            axis_label_text_font=FONT, axis_label_text_font_size="12px", axis_label_text_font_style="normal"
        )
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer step", chart.axis
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    tick = chart.style.tick
    plot.yaxis.formatter = (PrintfTickFormatter if tick.startswith("%") else NumeralTickFormatter)(
        format=tick
    )
    plot.xgrid.grid_line_color = None
    return plot


def _lines(plot: figure, chart: Chart, curve: Curve, series: Series) -> list[Any]:
    """The renderers of one curve: its line, faint under the means where it has many points, or dots where few."""
    from bokeh.models import HoverTool

    sources = {
        suffix: _source(points, curve.key + suffix) for suffix, points in points_of(chart, series).items()
    }
    style = {"line_width": 1.6, "line_dash": curve.dash, "name": curve.label}
    alpha = 0.35 if MEANS in sources else 1
    line = plot.line("step", "value", source=sources[""], line_alpha=alpha, **style)
    renderers = [line]
    if MEANS in sources:
        renderers.append(plot.line("step", "value", source=sources[MEANS], **style))
    if curve.marker and has_dots(curve, series):
        dots = {"marker": curve.marker, "size": SIZES[curve.marker], "line_color": None, "name": curve.label}
        renderers.append(plot.scatter("step", "value", source=line.data_source, **dots))
    for renderer in renderers:
        renderer.glyph.tags = [curve.colour]
    value = f"@value{{{chart.style.tip}}}"
    formatters = {"@value": "printf" if chart.style.tip.startswith("%") else "numeral"}
    plot.add_tools(
        HoverTool(
            renderers=[line],
            tooltips=f'<div style="{TIP}"><b style="color: var({curve.colour})">{value}</b> {curve.label}, '
            "step @step{0,0}</div>",
            formatters=formatters,
            mode="vline",
            show_arrow=False,
            visible=False,
        )
    )
    return renderers


def points_of(chart: Chart, series: Series) -> dict[str, list[Point]]:
    """The points of a curve, and where they are many those of the line of means over them."""
    points = list(zip(series.steps, series.values, strict=True))
    stretch = num_in_mean(len(points)) if chart.mean else 1
    return {"": points} | ({MEANS: means(points, stretch)} if stretch > 1 else {})


def has_dots(curve: Curve, series: Series) -> bool:
    return curve.marker is not None and len(series) <= NUM_MARKERS


def _source(points: Sequence[Point], name: str) -> Any:
    """Columns that travel as bytes: half the size of numbers written out."""
    import numpy
    from bokeh.models import ColumnDataSource

    kept = thinned(points)
    return ColumnDataSource(
        {
            "step": numpy.array([step for step, _ in kept], dtype=numpy.int32),
            "value": numpy.array([value for _, value in kept], dtype=numpy.float32),
        },
        name=name,
    )
