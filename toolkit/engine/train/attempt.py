"""One attempt at a run: how it begins, what it is held to, and what it leaves behind however it ends."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from toolkit import env, hardware
from toolkit.engine.base import model, oom, vram
from toolkit.engine.train import checkpoints
from toolkit.errors import UserError, exit_code, outcome_of
from toolkit.files import write_text
from toolkit.memory.plan import Settings
from toolkit.recipe.stages import BASE
from toolkit.records.run_manifest import PlanMade
from toolkit.redaction import blanked, redacted
from toolkit.report import on_finish, run_page, run_record
from toolkit.run import changes, manifest, runlog
from toolkit.run.rundir import EVENTS, PROCESSES, RunDir
from toolkit.training.job import Job

SHARED_SECONDS = 15  # in which a network disk shows to one machine what another wrote


def begin(job: Job) -> Path | None:
    """Makes the run directory what it is to be, and says in it how the run is made. Returns where it goes on."""
    run, console = job.run, job.console
    moved = run.start(job.trajectory(), job.fresh)
    runlog.LOG.open(run.log, console)
    if moved:
        console.print(f"[dim]the run that was there is now {escape(str(moved))}[/]")
    run.hold_to({f"packages.{name}": version for name, version in manifest.packages().items()})
    held = {f"memory.{name}": value for name, value in job.plan.settings.chosen().items()}
    held[PROCESSES] = job.world.size
    if job.reshard and (changed := run.reshard(held)):
        console.print(
            f"[yellow]{escape('; '.join(changed))}: each step has the rows that it would have had, dealt anew; dropout "
            "draws otherwise, and sums differ in their last bits[/]"
        )
    run.hold_to(held)
    checkpoints.sweep(run.checkpoints)
    checkpoint = checkpoints.latest(run.checkpoints, console)
    write_text(run.path / "recipe.resolved.yaml", blanked(job.recipe.to_yaml()))
    before = run.read_manifest()
    described = manifest.describe(job.recipe, hardware.here(), env.require_prepared())
    for note in manifest.notes_on(before, described) if checkpoint else ():
        console.print(f"[yellow]{escape(note)}[/]")
    run.report.unlink(missing_ok=True)  # an earlier session's
    step = checkpoints.step_of(checkpoint)
    resumed = {
        "resumed_from": checkpoint and checkpoint.name,
        "resumed_at_steps": (before.resumed_at_steps or []) + ([step] if checkpoint else []),
    }
    run.record(described | manifest.begun(before, step) | resumed | {"plan": PlanMade(**job.plan.to_dict())})
    return checkpoint


def _cut_off(job: Job, started: float, code: int, reason: str) -> None:
    """What is left to do for a run whose first process hangs and is about to be ended."""
    _unfinished(job, started, code, reason)
    on_finish.tell(outcome_of(code), reason, job.console)


def tell_others(job: Job, checkpoint: Path | None, started: float) -> None:
    """The other processes may begin: with these settings, at this checkpoint."""
    if job.processes.is_alone:
        return
    facts = {"settings": asdict(job.plan.settings), "checkpoint": checkpoint and checkpoint.name}
    job.processes.begin(
        _alike(job) | facts | {"begun": _begun(job.run)},
        when_cut_off=functools.partial(_cut_off, job, started),
    )


def hear_first(job: Job) -> tuple[Job, Path | None]:
    """The job of a process that is not the first, with the settings of the first, and where it goes on.

    Raises UserError where the two do not train the same, or do not see the same directory.
    """
    run = job.run
    first, own = job.processes.begin({}), _alike(job)
    here = f"in process {job.world.rank} on {socket.gethostname()}"
    if different := [found for what in own for found in changes.apart(what, first[what], own[what])]:
        raise UserError(
            "the processes of a run have to be started alike: "
            + "; ".join(
                f"{path} is {theirs!r} in the first process, {ours!r} {here}"
                for path, theirs, ours in different
            )
        )
    deadline = time.monotonic() + SHARED_SECONDS
    while _begun(run) != first["begun"]:
        if time.monotonic() > deadline:
            raise UserError(
                f"what the first process wrote to {run.path.absolute()} is not there {here}: name a folder on a disk "
                "that all machines mount with --runs DIR"
            )
        time.sleep(1)
    runlog.LOG.open(run.path / f"log.rank{job.world.rank}.txt", job.console)
    job = replace(job, plan=replace(job.plan, settings=Settings(**first["settings"])))
    return job, run.checkpoints / first["checkpoint"] if first["checkpoint"] else None


def _alike(job: Job) -> dict[str, Any]:
    """What all processes of a run have to have alike, one by one as a message names it."""
    return {
        "recipe": blanked(job.recipe.model_dump(mode="json")),
        "run": f"{job.run.name} from {job.start.name if job.start else BASE}",
        "packages": manifest.packages(),
        "device": model.device_type(),
    }


def _begun(run: RunDir) -> str | None:
    attempts = run.read_manifest().attempts
    return attempts[-1].started if attempts else None


@contextlib.contextmanager
def outcome(job: Job, started: float) -> Iterator[None]:
    """Records how the block ended, whatever ends it but a kill, and leaves a report of it."""
    try:
        yield
    except BaseException as error:
        runlog.failure(error)
        _unfinished(job, started, exit_code(error), str(error) or type(error).__name__)
        raise
    _end(job.run, started, "finished", None)
    _write_report(job, None)


def _unfinished(job: Job, started: float, code: int, reason: str) -> None:
    ended = {"outcome": outcome_of(code), "reason": redacted(reason)}
    with contextlib.suppress(OSError, UserError):  # a full or emptied disk must not hide the error itself
        _end(job.run, started, **ended)
    _write_report(job, ended)


def _end(run: RunDir, started: float, outcome: str, reason: str | None) -> None:
    end = {"outcome": outcome, "reason": reason, "ended": manifest.now()}
    run.record(end | manifest.noted(run.begun_manifest(), **end, seconds=time.monotonic() - started))


def _write_report(job: Job, unfinished: dict[str, Any] | None) -> None:
    """The page, and report.json of a run that did not come to write its own."""
    try:
        if unfinished:
            run_record.unfinished_report(job.run, known(job) | unfinished).write(job.run.report)
        job.console.print(f"[dim]report: {escape(str(run_page.write(job.run)))}[/]")
    except (Exception, KeyboardInterrupt) as error:  # how the run ended stands already
        job.console.print(
            f"[yellow]{escape(str(job.run.page))} is not written ({escape(repr(error))}); run_report.py writes it[/]"
        )


def recovery(job: Job) -> oom.Recovery:
    """What the stage's trainer does where memory runs out, and where that is told."""
    rank = None if job.world.is_alone else job.world.rank
    return oom.Recovery(job.run.path / EVENTS, job.console, rank=rank)


def known(job: Job) -> dict[str, Any]:
    """Fields of report.json that are known however a run ends."""
    return {
        "stage": job.stage.name,
        "recipe": job.recipe.name,
        "device": model.device_name(),
        "settings": asdict(job.plan.settings),
        "planned_peak_gib": job.plan.peak_gib,
        "planned_items_gib": job.plan.items_gib,
        "allocator": env.require_prepared().to_dict() | {"effective": vram.allocator_settings()},
    }
