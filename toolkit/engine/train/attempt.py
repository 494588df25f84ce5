"""One attempt at a run: how it begins, what it is held to, and what it leaves behind however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from toolkit import env, hardware
from toolkit.engine.base import model, vram
from toolkit.engine.train import checkpoints
from toolkit.errors import Interrupted, UserError
from toolkit.files import write_text
from toolkit.records.run_manifest import PlanMade
from toolkit.redaction import blanked, redacted
from toolkit.report import run_page, run_record
from toolkit.run import manifest, runlog
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job


def begin(job: Job) -> Path | None:
    """Makes the run directory what it is to be, and says in it how the run is made. Returns where it goes on."""
    run, console = job.run, job.console
    moved = run.start(job.trajectory(), job.fresh)
    runlog.LOG.open(run.log, console)
    if moved:
        console.print(f"[dim]the run that was there is now {escape(str(moved))}[/]")
    run.hold_to({f"packages.{name}": version for name, version in manifest.packages().items()})
    run.hold_to({f"memory.{name}": value for name, value in job.plan.settings.chosen().items()})
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


@contextlib.contextmanager
def outcome(job: Job, started: float) -> Iterator[None]:
    """Records how the block ended, whatever ends it but a kill, and leaves a report of it."""
    try:
        yield
    except BaseException as error:
        runlog.failure(error)
        ended = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        reason = redacted(str(error)) or type(error).__name__
        with contextlib.suppress(OSError, UserError):  # a full or emptied disk must not hide the error itself
            _end(job.run, started, ended, reason)
        _write_report(job, {"outcome": ended, "reason": reason})
        raise
    _end(job.run, started, "finished", None)
    _write_report(job, None)


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
