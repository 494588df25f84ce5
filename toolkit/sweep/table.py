"""A sweep on the screen: a line for runs that differ in their seed alone, and whether they differ from the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.evaluation.seeds import Mean
from toolkit.recipe.stages import PanelField
from toolkit.sweep.results import Compared, Result


def show(results: Sequence[Result], compared: Sequence[Compared], console: Console) -> None:
    """A table a measure, and what kept runs from their end."""
    for one in compared:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for head in (
            f"held-out {one.field.label}",
            "seeds",
            "mean, 95 %",
            *(["is it noise?"] if one.best else []),
        ):
            table.add_column(escape(head), no_wrap=True)
        for cell, mean in one.means.items():
            verdict = [_coloured(one.verdict(cell))] if one.best else []
            table.add_row(escape(cell), str(mean.num), interval(one.field, mean), *verdict)
        console.print(table)
        if one.why:
            console.print(f"[dim]not compared: {escape(one.why)}[/]")
    for said in notes(compared):
        console.print(f"[dim]{escape(said)}[/]")
    for result in results:
        if result.reason and result.outcome != "finished":
            console.print(f"[yellow]{escape(result.run.name)} {result.outcome}:[/] {escape(result.reason)}")


def notes(compared: Sequence[Compared]) -> list[str]:
    """How to read it."""
    if all(one.why for one in compared):
        return []
    return [
        "In brackets: 95 % over seeds. Noise or worse: than the best, paired by seed, p by Holm's method; noise is "
        "what seeds alone may make."
    ]


def interval(field: PanelField, mean: Mean | None) -> str:
    """`0.512 [0.498, 0.526]`, without the interval of one seed."""
    if mean is None:
        return "-"
    value = field.style.format(mean.value)
    if math.isnan(mean.low):
        return value
    return f"{value} ({field.style.format(mean.low)} to {field.style.format(mean.high)})"


def _coloured(verdict: str) -> str:
    for word, colour in (("best", "green"), ("worse", "red"), ("noise", "dim")):
        if verdict.startswith(word):
            return f"[{colour}]{verdict}[/]"
    return verdict
