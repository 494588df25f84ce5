"""`--on-finish CMD`: a command once a run has ended, however it did; it can change nothing of that.

It finds in its environment what VARIABLES names. A kill -9 runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from toolkit.errors import Interrupted
from toolkit.redaction import blanked, redacted
from toolkit.report import run_record
from toolkit.run.rundir import RunDir

PREFIX = "FINETUNE_"
VARIABLES = ("OUTCOME", "REASON", "NAME", "DIR", "STEPS", "LOSS", "SECONDS")
LONGEST_SECONDS = 60  # it may take; a host that asked the run to stop waits less

Facts = Callable[[], dict[str, Any]]

_asked: dict[str, Any] = {}


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-finish",
        metavar="CMD",
        help=f"run this in a shell when the run has ended, also failed or stopped; {PREFIX}OUTCOME, "
        f"{PREFIX}NAME and others tell it how (docs/runs.md)",
    )


def ask(command: str | None, facts: Facts = dict) -> None:
    """What is to be run when the process ends; `facts` gives the variables that are known then."""
    _asked.clear()
    if command:
        _asked.update(command=command, facts=facts)


def of_run(run: RunDir) -> dict[str, Any]:
    """What lies on disk of a run."""
    record = run_record.read(run)
    known = {"NAME": f"{run.recipe}/{run.name}", "DIR": run.path.absolute()}
    if record is None:
        return known
    return known | {
        "STEPS": record.report.num_steps,
        "LOSS": record.report.loss_last,
        "SECONDS": record.manifest.total_seconds and round(record.manifest.total_seconds),
    }


def tell(outcome: str, reason: str, console: Console) -> None:
    """Runs what was asked for, once; where that fails, one line."""
    if not _asked:
        return
    command, facts = _asked["command"], _asked["facts"]
    _asked.clear()
    try:
        known = facts()
    except Exception as error:  # whatever is wrong with its files, how the run ended is told
        known = {"REASON": type(error).__name__}
    given = dict.fromkeys(VARIABLES) | known | {"OUTCOME": outcome, "REASON": redacted(reason)}
    variables = {PREFIX + name: "" if value is None else str(blanked(value)) for name, value in given.items()}
    try:
        problem = _problem(command, variables)
    except (OSError, ValueError, KeyboardInterrupt, Interrupted) as error:
        problem = str(error) or "it was interrupted"
    if problem:
        console.print(f"[yellow]--on-finish failed:[/] {escape(redacted(problem))}", soft_wrap=True)


def _problem(command: str, variables: dict[str, str]) -> str | None:
    """What went wrong; None when nothing did. Its output is shown only then: the last line."""
    process = subprocess.Popen(
        command,
        shell=True,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # all that it starts can be ended with it, and Ctrl-C is not for it
    )
    try:
        said, _ = process.communicate(timeout=LONGEST_SECONDS)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"it took more than {LONGEST_SECONDS} s and was ended"
        raise
    if process.returncode == 0:
        return None
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    return f"exit code {process.returncode}: {last}"
