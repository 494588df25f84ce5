"""The runs of a sweep before the first begins: planned, checked, listed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit import hardware
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.records.data_report import DataReport
from toolkit.run.rundir import RunDir
from toolkit.sweep.points import Asked
from toolkit.training import preflight
from toolkit.training.job import Job


def jobs(
    sweep: Asked, arguments: argparse.Namespace, machine: hardware.Hardware, console: Console
) -> list[Job]:
    """One for each point, planned as that run alone would be."""
    made = []
    for point in sweep.points:
        run = RunDir(arguments.runs, point.recipe.name, point.name)
        kept = {} if arguments.fresh else run.settings()
        rows = DataReport.load(run.data_report)
        plan = plan_stage(point.recipe, sweep.stage, machine.card, machine.ram_gib, kept, rows)
        made.append(Job(point.recipe, plan, run, console, arguments.fresh, arguments.from_))
    chunks = sorted({job.plan.settings.loss_chunk_gib or 0.0 for job in made})
    if len(chunks) > 1:  # Unsloth reads it once, when it is imported
        raise UserError(
            f"the runs would take memory.loss_chunk_gib {', '.join(map(str, chunks))}, and a process takes one: "
            f"--set memory.loss_chunk_gib={chunks[0]}"
        )
    return made


def problems(made: Sequence[Job], planning: bool = False) -> list[str]:
    """Whatever would keep one of the runs from starting, each problem once; in `planning` its start may be absent."""
    found: list[str] = []
    for job in made:
        try:
            if job.is_finished():
                continue
        except UserError as error:
            found += error.problems
        found += job.problems()
        if not planning or (job.start and job.start.is_there()):
            found += preflight.of_start(job)
    return list(dict.fromkeys(found))


def show(made: Sequence[Job], console: Console) -> None:
    """A line a run: where it goes on, and the memory that it is planned to take."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in ("run", "begins", "planned peak"):
        table.add_column(head, no_wrap=True)
    for job in made:
        table.add_row(escape(job.run.name), _begins(job), f"{job.plan.peak_gib:.2f} GiB")
    console.print(table)


def _begins(job: Job) -> str:
    try:
        step = job.begins_at_step()
    except UserError:
        return "cannot: see below"
    return "is finished" if step is None else f"after step {step:,}" if step else "anew"
