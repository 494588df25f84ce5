"""One training stage from recipe to report: what SFT and DPO share, in the order it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from transformers import PrinterCallback, set_seed

from toolkit import env, hardware, manifest, report_page, run_record, runlog
from toolkit.engine import answers, checkpoints, data, hub, model, probe, recompute, trackers, vram
from toolkit.engine.interrupt import StopOnSignal
from toolkit.engine.progress import Metrics
from toolkit.engine.quiet import quiet
from toolkit.errors import Interrupted
from toolkit.job import Job
from toolkit.length_groups import grouped_by_length
from toolkit.rundir import write_json, write_text
from toolkit.screen import bar

# (job, loaded model, prepared data) -> a Trainer that is ready to train
BuildTrainer = Callable[[Job, model.Loaded, data.Prepared], Any]


def run(job: Job, build: BuildTrainer) -> dict[str, Any]:
    """Trains one stage, or goes on where it stopped, and saves its adapter. Returns what report.json holds.

    Raises UserError for whatever the user can mend and Interrupted after a signal; nothing in the run directory
    looks finished then, and its manifest says why it ended.
    """
    stop = StopOnSignal(job.console)
    with job.run.locked(), stop.listening():
        starting_adapter = job.run.starting_adapter(job.recipe.sft is not None)
        checkpoint = _start(job)
        with _outcome(job), quiet():
            return _train(job, build, starting_adapter, checkpoint, stop)


def _start(job: Job) -> Path | None:
    """Makes the run directory what it is to be, and says in it how the run is made. Returns where it goes on."""
    moved = job.run.start(job.recipe.trajectory(job.stage), job.fresh)
    runlog.LOG.open(job.run.log, job.console)
    if moved:
        job.console.print(f"[dim]the run that was there is now {moved}[/]")
    checkpoint = checkpoints.latest(job.run.checkpoints, job.console)
    resumed_at = [] if checkpoint is None else [checkpoints.step_of(checkpoint)]
    job.run.report.unlink(missing_ok=True)  # an earlier session's
    write_text(job.run.path / "recipe.resolved.yaml", job.recipe.to_yaml())
    described = manifest.describe(job.recipe, hardware.here(), env.require_prepared())
    job.run.record(
        described
        | {
            "outcome": "running",
            "reason": None,
            "started": manifest.now(),
            "ended": None,
            "resumed_from": checkpoint and checkpoint.name,
            "resumed_at_steps": job.run.read_manifest().get("resumed_at_steps", []) + resumed_at,
            "plan": job.plan.to_dict(),
        }
    )
    return checkpoint


@contextlib.contextmanager
def _outcome(job: Job) -> Iterator[None]:
    """Records how the block ended, whatever ends it but a kill, and leaves a report of it."""
    run = job.run
    try:
        yield
    except BaseException as error:
        runlog.fault(error)
        outcome = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        reason = manifest.redacted(str(error)) or type(error).__name__
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            run.record({"outcome": outcome, "reason": reason, "ended": manifest.now()})
        _write_report(job, {"outcome": outcome, "reason": reason})
        raise
    run.record({"outcome": "finished", "ended": manifest.now()})
    _write_report(job, None)


def _write_report(job: Job, unfinished: dict[str, Any] | None) -> None:
    """The page, and report.json of a run that did not come to write its own."""
    try:
        if unfinished:
            write_json(job.run.report, run_record.unfinished_report(job.run, _known(job) | unfinished))
        job.console.print(f"[dim]report: {report_page.write(job.run)}[/]", soft_wrap=True)
    except (Exception, KeyboardInterrupt) as error:  # how the run ended stands already
        job.console.print(
            f"[yellow]{job.run.page} is not written ({escape(repr(error))}); run_report.py writes it[/]"
        )


def _train(
    job: Job, build: BuildTrainer, starting_adapter: Path | None, checkpoint: Path | None, stop: StopOnSignal
) -> dict[str, Any]:
    started = time.perf_counter()
    recipe, section, settings, run, console = job.recipe, job.section, job.plan.settings, job.run, job.console
    set_seed(recipe.seed)

    with bar(console, f"loading {recipe.model.path}", None, hub.fetching(recipe.model.path)):
        loaded = model.load(recipe, section.max_length, settings)
        model.attach_lora(loaded, recipe, settings, section.max_length)
    for note in loaded.notes:
        console.print(f"[yellow]{note}[/]")
    if starting_adapter:
        model.load_adapter(loaded.model, starting_adapter)
    model.check_disk(loaded, run, num_checkpoints=section.save_total_limit + 1)  # one more while it rotates
    prepared = data.prepare(recipe, job.stage, loaded, console)
    write_json(run.path / "data_report.json", prepared.report)
    if section.group_by_length:
        order = grouped_by_length(prepared.train["length"][:], section.effective_batch_size, recipe.seed)
        prepared.train = prepared.train.select(order)

    trainer = build(job, loaded, prepared)
    trainer.remove_callback(PrinterCallback)
    layers = recompute.Recompute(settings.checkpoint_layers)
    probed = probe.Probe(trainer, layers, job.plan.peak_gib, job.plan.items_gib["optimizer"])
    title = f"{job.stage} · {recipe.name}"
    timeline, metrics = vram.Timeline(), Metrics(run.metrics, console, title, checkpoint)
    for callback in (layers, probed, timeline, metrics, stop):  # each relies on the ones before
        trainer.add_callback(callback)
    train_started = time.perf_counter()
    with contextlib.closing(metrics), trackers.attached(trainer, job, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.raise_if_received(trainer.state.global_step)
        train_seconds = time.perf_counter() - train_started
        if prepared.eval is not None:
            trainer.evaluate()
    report = _report(job, trainer, loaded, train_seconds) | {
        "measured_peak_gib": timeline.peak_gib,
        "probe": probed.measured,
        "oom_events": trainer.recovery.events,
    }
    if job.stage == "dpo":
        report["reference"] = trainer.reference
    with bar(console, "saving the adapter", None):
        model.save_adapter(
            loaded, run, {"trajectory": recipe.trajectory(job.stage), "num_steps": report["num_steps"]}
        )
    report["answers"] = answers.compare(job, loaded, starting_adapter)
    report["wall_seconds"] = time.perf_counter() - started
    write_json(run.report, report)
    run.record({"num_steps": report["num_steps"], "train_tokens": report["train_tokens"]})
    return report


def _report(job: Job, trainer: Any, loaded: model.Loaded, train_seconds: float) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    last_eval = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    return (
        dict.fromkeys(run_record.REPORT_KEYS)
        | _known(job)
        | {
            "outcome": "finished",
            "reason": None,
            "num_steps": trainer.state.global_step,
            "wall_seconds": None,
            "train_seconds": train_seconds,
            "train_tokens": int(tokens[-1]) if tokens else None,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval": {
                key.removeprefix("eval_"): value
                for key, value in last_eval.items()
                if key.startswith("eval_")
            },
            "notes": loaded.notes,
        }
    )


def _known(job: Job) -> dict[str, Any]:
    """What report.json says of a run however it ended."""
    return {
        "stage": job.stage,
        "recipe": job.recipe.name,
        "device": model.device_name(),
        "settings": asdict(job.plan.settings),
        "planned_peak_gib": job.plan.peak_gib,
        "planned_items_gib": job.plan.items_gib,
        "allocator": env.require_prepared().to_dict() | {"effective": vram.allocator_settings()},
    }
