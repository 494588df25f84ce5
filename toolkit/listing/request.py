"""What `run_list.py` is asked for: which runs, in which order, and what of them is to go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit import command
from toolkit.errors import UserError
from toolkit.listing import leftovers, removal, view
from toolkit.listing.entries import STAGES, STATES, Entry
from toolkit.listing.removal import Removal
from toolkit.recipe import stages

# What --sort takes: newest, longest and largest first, names from a on; what is not known comes last
KEYS: dict[str, Callable[[Entry], Any]] = {
    "when": lambda entry: entry.when and -entry.when.timestamp(),
    "name": lambda entry: entry.full_name,
    "steps": lambda entry: None if entry.num_steps is None else -entry.num_steps,
    "time": lambda entry: None if entry.seconds is None else -entry.seconds,
    "size": lambda entry: -entry.size_bytes,
}
FILTERS = ("recipe", "stage", "outcome", "sort")


def parse(doc: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Ends the process, as argparse does, for those that do not go together."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=command.RUNS, metavar="DIR", help="where the runs are")
    parser.add_argument("--recipe", metavar="NAME", help="only those of this recipe")
    parser.add_argument(
        "--stage", metavar="NAME", type=_stage, help=f"only {', '.join(STAGES)}, or a variant"
    )
    parser.add_argument("--outcome", choices=STATES, help="only those that ended so, or run")
    parser.add_argument(
        "--sort", choices=KEYS, help="newest, longest, largest first, or by name (default when)"
    )
    parser.add_argument("--json", action="store_true", help="the list as JSON, with more figures")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--remove", nargs="+", metavar="RECIPE/NAME", help="remove these runs, as tiny/dpo-beta02"
    )
    what.add_argument(
        "--prune",
        action="store_true",
        help="remove what nothing needs: runs moved aside, failed exports, leftovers, unused caches",
    )
    parser.add_argument(
        "--unused-days",
        type=_days,
        metavar="N",
        help="with --prune: caches go after so many days (default 30)",
    )
    parser.add_argument("--yes", action="store_true", help="with --remove or --prune: do not ask")
    arguments = parser.parse_args(words)
    if arguments.unused_days is not None and not arguments.prune:
        parser.error("--unused-days goes with --prune")
    if arguments.remove or arguments.prune:
        for option in (*FILTERS, "json"):
            if getattr(arguments, option):
                parser.error(f"--{option} goes with the list, not with --remove and --prune")
    elif arguments.yes:
        parser.error("--yes goes with --remove or --prune")
    return arguments


def _stage(text: str) -> str:
    if text not in STAGES and not stages.is_variant(text):
        raise argparse.ArgumentTypeError(f"{text!r}: one of {', '.join(STAGES)}, or a variant, as dpo-beta02")
    return text


def _days(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")
    return int(text)


def chosen(entries: Sequence[Entry], arguments: argparse.Namespace) -> list[Entry]:
    """Those that the options leave, in the order that they ask for."""
    key = KEYS[arguments.sort or "when"]
    found = [
        entry
        for entry in entries
        if arguments.recipe in (None, entry.recipe)
        and arguments.stage in (None, entry.stage, entry.name)
        and arguments.outcome in (None, entry.outcome)
    ]
    return sorted(found, key=lambda entry: ((value := key(entry)) is None, value, entry.full_name))


def removals(entries: Sequence[Entry], arguments: argparse.Namespace) -> tuple[list[Removal], list[str]]:
    """What is to go, and what should be known before. Raises UserError for what cannot."""
    if arguments.remove:
        return removal.named(entries, arguments.remove)
    days = leftovers.UNUSED_DAYS if arguments.unused_days is None else arguments.unused_days
    return leftovers.find(arguments.runs, entries, days)


def agreed(found: Sequence[Removal], console: Console, yes: bool) -> bool:
    """Whether to go on: by --yes, or by the answer. Raises UserError where nobody can be asked."""
    what = f"remove {len(found):,}, which makes {view.room(found)} of room"
    if yes:
        return True
    if not (sys.stdin and sys.stdin.isatty() and console.file.isatty()):
        raise UserError(f"nothing was removed: no terminal to ask on whether to {what}; --yes does not ask")
    console.print(f"{what}? \\[y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
