"""Curves as figures that can be zoomed and read, drawn by Bokeh; imported only when there is something to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.report.curves import PLANNED, Chart, Curve, Point, Series, means, num_in_mean, thinned

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

HEIGHT_PIXELS = 260
NUM_MARKERS = 30  # up to so many points are worth a dot each
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
# The figures' colours are those of the page, whichever of its two palettes holds now or later. What is tagged with a
# custom property wears it. Bokeh makes its document before it draws anything, so nothing flashes.
# A finger scrolls the page: figures take it for a zoom only once their toolbar says so.
PAINT = """
(() => {
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    for (const made of Bokeh.documents) for (const model of made.all_models) {
      const [tag] = model.tags;
      if (touch && /(Box|Wheel)ZoomTool/.test(model.type)) model.active = false;
      if (tag && "line_color" in model.properties) model.line_color = colour(tag);
      if (tag && "fill_color" in model.properties) model.fill_color = colour(tag);
      if ("major_label_text_color" in model.properties) model.major_label_text_color = colour("--quiet");
      if ("grid_line_color" in model.properties && model.grid_line_color) model.grid_line_color = colour("--line");
      if ("label_text_color" in model.properties) model.label_text_color = colour("--ink");
    }
  };
  const start = () => Bokeh.documents.length ? paint() : setTimeout(start, 5);
  start();
  dark.addEventListener("change", paint);
})();
"""


@dataclass(frozen=True)
class Drawn:
    """HTML to put into a page: `script` once, after all of `divs`, one for each chart."""

    script: str
    divs: list[str]


def draw(charts: Sequence[Chart], series: dict[str, Series], marks: Sequence[int]) -> Drawn:
    """The charts as figures that zoom along the steps together. `marks` are steps where something happened.

    The script brings Bokeh along (1.3 MB) and gives the figures the page's colours, dark or light.
    """
    from bokeh.embed import components
    from bokeh.models import Range1d
    from bokeh.resources import Resources

    if not charts:
        return Drawn("", [])
    drawn = [series[curve.key].steps for chart in charts for curve in chart.curves]
    first, last = min(steps[0] for steps in drawn), max(steps[-1] for steps in drawn)
    room = max((last - first) * 0.02, 0.5)
    shared = Range1d(first - room, last + room, bounds="auto")
    figures = [_figure(chart, series, shared, marks) for chart in charts]
    script, divs = components(figures)
    library = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    return Drawn(f"<script>{library}</script>{script}<script>{PAINT}</script>", list(divs))


def _figure(chart: Chart, series: dict[str, Series], steps: Range1d, marks: Sequence[int]) -> figure:
    from bokeh.models import (
        DataRange1d,
        Legend,
        LegendItem,
        NumeralTickFormatter,
        PrintfTickFormatter,
        Span,
        WheelZoomTool,
    )
    from bokeh.plotting import figure

    plot = figure(
        height=HEIGHT_PIXELS,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=DataRange1d(only_visible=True),
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
    if len(items) > 1 or chart.curves[0].label != chart.title.lower():
        legend = Legend(items=items, click_policy="hide", ncols=2 if len(items) > 2 else len(items), **LEGEND)
        plot.add_layout(legend, "above")
    for step in sorted(marks)[:NUM_MARKS]:
        plot.add_layout(Span(location=step, dimension="height", line_dash="dotted", tags=["--warn"]))
    for axis in (plot.xaxis[0], plot.yaxis[0]):
        axis.update(axis_line_color=None, major_tick_line_color=None, minor_tick_line_color=None)
        axis.update(major_label_text_font=FONT, major_label_text_font_size="12px")
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    is_printf = chart.tick.startswith("%")
    plot.yaxis.formatter = (PrintfTickFormatter if is_printf else NumeralTickFormatter)(format=chart.tick)
    plot.xgrid.grid_line_color = None
    return plot


def _lines(plot: figure, chart: Chart, curve: Curve, series: Series) -> list[Any]:
    """The renderers of one curve: its line, faint under the means where it has many points, or dots where few."""
    from bokeh.models import HoverTool

    points = list(zip(series.steps, series.values, strict=True))
    stretch = num_in_mean(len(points)) if chart.mean else 1
    style = {"line_width": 1.6, "line_dash": "dashed" if curve.dashed else "solid", "name": curve.label}
    line = plot.line("step", "value", source=_source(points), line_alpha=0.35 if stretch > 1 else 1, **style)
    renderers = [line]
    if stretch > 1:
        renderers.append(plot.line("step", "value", source=_source(means(points, stretch)), **style))
    if len(points) <= NUM_MARKERS and curve.key != PLANNED:
        renderers.append(
            plot.scatter("step", "value", source=line.data_source, size=5, line_color=None, name=curve.label)
        )
    for renderer in renderers:
        renderer.glyph.tags = [curve.colour]
    value = f"@value{{{chart.style}}}"
    formatters = {"@value": "printf" if chart.style.startswith("%") else "numeral"}
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


def _source(points: Sequence[Point]) -> Any:
    """Columns that travel as bytes: half the size of numbers written out."""
    import numpy
    from bokeh.models import ColumnDataSource

    kept = thinned(points)
    return ColumnDataSource(
        {
            "step": numpy.array([step for step, _ in kept], dtype=numpy.int32),
            "value": numpy.array([value for _, value in kept], dtype=numpy.float32),
        }
    )
