"""What was measured, for a reader: comparison tables on screen and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.recipe import Recipe

MEASURES = (
    ("correct_fraction", "answered correctly", "{:.1%}"),
    ("ended_fraction", "ended by itself", "{:.1%}"),
    ("mean_answer_tokens", "tokens an answer", "{:.1f}"),
    ("preference_accuracy", "prefers the chosen reply", "{:.1%}"),
)


def show_comparison(rows: list[dict[str, Any]], models: dict[str, dict[str, Any]], console: Console) -> None:
    """Answers side by side, then the measures, one column a model."""
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", style="bold", ratio=2)
    for name in models:
        table.add_column(name, ratio=3)
    for row in rows:
        table.add_row(escape(row["prompt"]), *(escape(row["answers"][name]) for name in models))
    console.print(table)
    console.print(_measures_table(models))


def comparison_markdown(recipe: Recipe, rows: list[dict[str, Any]], models: dict[str, dict[str, Any]]) -> str:
    """The same as Markdown."""
    names = list(models)
    lines = [f"# {recipe.name}: {' / '.join(names)}", "", recipe.description, ""]
    lines += [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _measure_rows(models)]
    for row in rows:
        lines += ["", f"## {row['prompt']}", ""]
        for name in names:
            quoted = row["answers"][name].strip().replace("\n", "\n> ") or "(empty)"
            lines += [f"**{name}**", "", f"> {quoted}", ""]
    return "\n".join(lines) + "\n"


def _measures_table(models: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    for label, cells in _measure_rows(models):
        table.add_row(label, *cells)
    return table


def _measure_rows(models: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = []
    for key, label, style in MEASURES:
        values = [measures.get(key) for measures in models.values()]
        if any(value is not None for value in values):
            rows.append((label, ["-" if value is None else style.format(value) for value in values]))
    return rows
