"""The checks on the screen, a line each and the fix below it, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.doctor.check import Check
from toolkit.redaction import blanked

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def show(checks: Sequence[Check], console: Console) -> None:
    """A table that wraps on a terminal; plain lines elsewhere, one a check, so that grep finds its fix too."""
    if not checks:
        return
    width = max(len(check.name) for check in checks)
    if not console.file.isatty():
        for check in checks:
            fix = f"; fix: {check.fix}" if check.fix else ""
            console.print(escape(blanked(f"{check.status:4}  {check.name:{width}}  {check.found}{fix}")))
        return
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        colour = COLOURS[check.status]
        fix = f"\n[{colour}]{escape(blanked(check.fix))}[/]" if check.fix else ""
        table.add_row(f"[{colour}]{check.status}[/]", check.name, f"{escape(blanked(check.found))}{fix}")
    console.print(table)


def as_json(checks: Sequence[Check]) -> str:
    can_run = all(check.status != "fail" for check in checks)
    return json.dumps({"can_run": can_run, "checks": [check.to_dict() for check in checks]}, indent=2)
