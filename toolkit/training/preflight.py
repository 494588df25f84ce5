"""The plan of a job on the screen, and whatever would keep the run from starting that can be known without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.markup import escape

from toolkit.console.plan_view import show_plan
from toolkit.console.screen import Steady
from toolkit.errors import UserError
from toolkit.training.job import Job


def of_start(job: Job) -> list[str]:
    """What is wrong with the adapter that the stage continues."""
    try:
        if job.start:
            job.start.check(job.recipe)
    except UserError as error:
        return list(error.problems)
    return []


def show(job: Job, about: Sequence[tuple[str, str]] = ()) -> None:
    """The plan, what the run continues, and a warning where it is too short for its warm-up."""
    facts = list(about)
    if job.start:
        absent = "" if job.start.is_there() else ", which is not there yet"
        facts.insert(0, ("continues", f"{job.start.folder}{absent}"))
    show_plan(job.recipe, job.plan, job.run.name, job.console, facts)
    if short := job.short_for_warmup():
        job.console.print(f"[yellow]{escape(short)}[/]")


def show_and_check(job: Job, as_json: bool) -> None:
    """What `--plan` asks for. Raises UserError with everything that is wrong, once the plan is shown."""
    problems = job.problems()
    if job.start and job.start.is_there():
        problems += of_start(job)
    try:
        step = job.begins_at_step()
    except UserError as error:
        step, problems = 0, [*error.problems, *problems]
    if as_json:
        shown = job.plan.to_dict() | {"begins_at_step": step}
        Steady(sys.stdout).write(json.dumps(shown, indent=2) + "\n")
    else:
        show(job, [("begins", "is finished: --fresh begins again" if step is None else _after(step))])
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _after(step: int) -> str:
    return f"after step {step:,}" if step else "anew"
