"""The runs of a sweep one after the other in this process, on one base model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from toolkit.engine.train.kept_base import KeptBase
from toolkit.errors import UserError
from toolkit.training.job import Job


def run(jobs: Sequence[Job], console: Console, ended: Callable[[dict[str, str]], object]) -> dict[str, str]:
    """Trains them. `ended` is told after each run why others could not; so is the caller at the end.

    A run that fails does not end the others, and takes the base along: the next one loads it.
    """
    base, failed = KeptBase(), {}
    for number, job in enumerate(jobs, 1):
        name = job.run.name
        console.print(f"[bold]{number} of {len(jobs)}: {escape(name)}[/]")
        try:
            importlib.import_module(f"toolkit.engine.train.{job.stage.name}").run(replace(job, base=base))
        except Exception as error:  # a signal is none
            failed[name] = _said(error, job)
            console.print(f"[yellow]{escape(name)} failed:[/] {escape(failed[name])}")
            base.forget()
        finally:
            ended(failed)
    times = f"{base.num_loads} time{'s' * (base.num_loads != 1)}"
    console.print(f"the base model was loaded {times} for {len(jobs)} runs", style="dim")
    return failed


def _said(error: Exception, job: Job) -> str:
    if isinstance(error, UserError):
        return "; ".join(error.problems)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"an internal error, {type(error).__name__}: {first}; what led to it is in {job.run.log}"
