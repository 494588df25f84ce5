"""The list on the screen, a line a run, or as JSON; and what is to be removed, with the room that it makes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.console.panel import duration
from toolkit.listing.entries import Entry
from toolkit.listing.removal import Removal
from toolkit.recipe import stages
from toolkit.report.measures import OF_ANSWERS, OF_HELD_OUT

COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "not begun": "dim"}  # else red
HEADS = ("run", "outcome", "when (UTC)", "steps", "last", "held out", "time", "size", "from")
RIGHT = {"steps", "time", "size"}
FOLDED = {"held out": 16, "from": 16}  # columns that may take several lines, and their least width
GIVES_WAY = ("time", "steps", "from", "held out", "last")  # on a narrow terminal, in this order
GAP = 2
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show(entries: Sequence[Entry], console: Console) -> None:
    """A table on a terminal; elsewhere columns of the same, a run a line however long, so that grep finds it."""
    if entries:
        _grid([HEADS, *map(cells, entries)], console)
    console.print(f"[dim]{_count(entries, 'run')}, {room(entries)}[/]")


def as_json(entries: Iterable[Entry]) -> str:
    return json.dumps([entry.to_dict() for entry in entries], indent=2)


def show_removals(removals: Sequence[Removal], kept: Iterable[str], console: Console) -> None:
    rows = [(size(one.size_bytes), one.name, one.why) for one in removals]
    if rows:
        _grid([("size", "to be removed", "why"), *rows], console)
    for line in kept:
        console.print(f"[yellow]{escape(line)}[/]")


def room(found: Iterable[Entry | Removal]) -> str:
    return size(sum(one.size_bytes for one in found))


def size(num_bytes: int) -> str:
    """`12 KiB`, `1.4 GiB`: two digits or more."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit + 1 < len(UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit and value < 10 else f"{value:.0f} {UNITS[unit]}"


def _count(found: Sequence[object], what: str) -> str:
    return f"{len(found):,} {what}{'s' * (len(found) != 1)}"


def cells(entry: Entry) -> tuple[str, ...]:
    """Under HEADS."""
    return (
        entry.full_name,
        entry.outcome,
        f"{entry.when:%Y-%m-%d %H:%M}" if entry.when else "-",
        "-" if entry.num_steps is None else f"{entry.num_steps:,}",
        _last(entry),
        _held_out(entry),
        "-" if entry.seconds is None else duration(entry.seconds),
        size(entry.size_bytes),
        ", ".join(entry.made_from) or "-",
    )


def _last(entry: Entry) -> str:
    """The last of the curves that the live panel draws: the loss, or where there is one the margin."""
    for field in reversed(stages.of(entry.stage).panel_fields if entry.stage in stages.names() else ()):
        if field.has_curve and field.key in entry.last:
            value = entry.last[field.key]
            return f"{field.label} {'not finite' if value is None else field.style.format(value)}"
    return "-"


def _held_out(entry: Entry) -> str:
    if entry.stage in stages.names():
        fields = [field for field in stages.of(entry.stage).panel_fields if field.key in entry.held_out]
        return (
            f"{fields[-1].label} {fields[-1].style.format(entry.held_out[fields[-1].key])}" if fields else "-"
        )
    for name, values in entry.held_out.items():
        how = (OF_ANSWERS | OF_HELD_OUT)[name] if entry.stage == "compare" else OF_HELD_OUT[name]
        shown = ("-" if value is None else how.text(value) for value in values.values())
        return f"{how.label} {', '.join(shown)}"
    return "-"


def _grid(rows: Sequence[tuple[str, ...]], console: Console) -> None:
    """Rows under the heads that the first one holds."""
    columns = {head: [row[place] for row in rows] for place, head in enumerate(rows[0])}
    widths = {head: max(map(len, cells)) for head, cells in columns.items()}
    if not console.file.isatty():
        for row in rows:
            cells = zip(widths.items(), row, strict=True)
            line = (cell.rjust(wide) if head in RIGHT else cell.ljust(wide) for (head, wide), cell in cells)
            console.print(escape((" " * GAP).join(line).rstrip()))
        return
    least = {head: min(wide, FOLDED.get(head, wide)) + GAP for head, wide in widths.items()}
    left_out = []
    for head in GIVES_WAY:
        if sum(least.values()) - GAP > console.width and least.pop(head, 0):
            left_out.append(head)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for head in least:
        table.add_column(head, justify="right" if head in RIGHT else "left", no_wrap=head not in FOLDED)
    for place in range(1, len(rows)):
        table.add_row(*(_coloured(head, columns[head][place]) for head in least))
    console.print(table)
    if left_out:
        console.print(f"[dim]a wider terminal, or --json, also shows: {', '.join(left_out)}[/]")


def _coloured(head: str, cell: str) -> str:
    return f"[{COLOURS.get(cell, 'bold red')}]{escape(cell)}[/]" if head == "outcome" else escape(cell)
