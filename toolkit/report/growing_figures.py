"""The same figures for a page that embeds them itself and lets them grow: drawn once, then only what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from toolkit.report.curves import Chart, Series, thinned
from toolkit.report.figures import figure_of, has_dots, in_a_document, points_of, spanned

STEPS = "steps"  # the name of the range that all figures share


def embedded(charts: Sequence[Chart], series: dict[str, Series], legends: bool) -> dict[str, Any]:
    """Bokeh's documents, what to render of them, and the ids of the elements, one for each chart."""
    from bokeh.embed.util import standalone_docs_json_and_render_items
    from bokeh.models import Range1d

    shared = Range1d(*spanned(charts, series), name=STEPS)
    plots = in_a_document([figure_of(chart, series, shared, (), legends) for chart in charts])
    documents, items = standalone_docs_json_and_render_items(plots)[:2]
    ids = [root.elementid for root in items[0].roots]
    return {"documents": documents, "items": [item.to_json() for item in items], "ids": ids}


def columns(charts: Sequence[Chart], series: dict[str, Series]) -> dict[str, dict[str, list[Any]]]:
    """What the figures' sources hold, by name: as `embedded` has drawn them, of what was logged by now."""
    found: dict[str, dict[str, list[Any]]] = {}
    for chart, curve in [(one, curve) for one in charts for curve in one.curves]:
        for suffix, points in points_of(chart, series[curve.key]).items():
            kept = thinned(points)
            found[curve.key + suffix] = {
                "step": [step for step, _ in kept],
                "value": [value for _, value in kept],
            }
    return found


def shape(charts: Sequence[Chart], series: dict[str, Series]) -> str:
    """Names what only another drawing changes: while it stays, new columns are enough."""
    lines = [
        (chart, len(points_of(chart, series[curve.key])), has_dots(curve, series[curve.key]))
        for chart in charts
        for curve in chart.curves
    ]
    return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
