"""One training stage from recipe to report: what SFT and DPO share, in the order it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from transformers import PrinterCallback, set_seed

from toolkit.console.screen import bar
from toolkit.data.length_groups import grouped_by_length
from toolkit.engine.base import fingerprint, hub, model, ranks
from toolkit.engine.base.quiet import quiet
from toolkit.engine.base.ranks import Ranks
from toolkit.engine.data import preparation
from toolkit.engine.train import answers, attempt, finite, held_out_scores, trackers
from toolkit.engine.train.callbacks import Callbacks
from toolkit.engine.train.interrupt import StopOnSignal
from toolkit.engine.train.progress import evaluated_at
from toolkit.errors import UserError
from toolkit.files import digest
from toolkit.recipe.schema import AnswersSection, StageSection
from toolkit.records.marks import AdapterMark, Made
from toolkit.records.run_manifest import Base
from toolkit.records.run_report import RunReport
from toolkit.run import sealing
from toolkit.run.rundir import STARTED_FROM, WEIGHTS
from toolkit.training import schedule
from toolkit.training.job import Job

# What to do where the disk is full; the last checkpoint is complete
ELSEWHERE = (
    "move it to another disk and name that with --runs DIR; the command then goes on from the last checkpoint"
)
# (job, loaded model, prepared data) -> a Trainer that is ready to train
BuildTrainer = Callable[[Job, model.LoadedModel, preparation.Prepared], Any]


def run(job: Job, build: BuildTrainer) -> RunReport:
    """Trains one stage, or goes on where it stopped, and saves its adapter. Returns what report.json holds.

    Raises UserError for whatever the user can fix and Interrupted after a signal; its manifest says how the run ended,
    and nothing in the run directory looks finished that is not: a signal after the adapter was saved comes too late.
    """
    with ranks.joined(job.world, torch.device(model.device_type())) as processes:
        job = replace(job, processes=processes)
        stop = StopOnSignal(job.console, processes)
        return (_lead if processes.is_first else _follow)(job, build, stop)


def _lead(job: Job, build: BuildTrainer, stop: StopOnSignal) -> RunReport:
    with job.run.locked(), stop.listening(), sealing.room(job.run.path, ELSEWHERE):
        started = time.monotonic()
        notes = job.start.check(job.recipe) if job.start else []
        checkpoint = attempt.begin(job)
        for note in notes:
            job.console.print(f"[yellow]{escape(note)}[/]")
        with attempt.outcome(job, started), quiet(), job.processes.as_one():
            attempt.tell_others(job, checkpoint, started)
            report = _train(job, build, checkpoint, stop, started)
        stop.check()  # a signal that cost the answers alone; what stands behind && must not start for it
        return report


def _follow(job: Job, build: BuildTrainer, stop: StopOnSignal) -> RunReport:
    """The part of a process that is not the first: it trains, and writes nothing but its own log."""
    with stop.listening(), quiet():
        job, checkpoint = attempt.hear_first(job)
        return _train(job, build, checkpoint, stop, time.monotonic())


def _train(
    job: Job,
    build: BuildTrainer,
    checkpoint: Path | None,
    stop: StopOnSignal,
    started: float,
) -> RunReport:
    recipe, section, settings, run, console = job.recipe, job.section, job.plan.settings, job.run, job.console
    processes: Ranks = job.processes
    set_seed(recipe.seed)
    processes.connect()

    with bar(console, f"loading {recipe.model.path}", None, hub.fetching(recipe.locate(recipe.model.path))):
        load = job.base.load if job.base else model.load
        loaded = load(recipe, section.max_length, settings, task=job.stage.task)
        model.attach_lora(loaded, recipe, settings, section.max_length)
    for note in loaded.notes:
        console.print(f"[yellow]{escape(note)}[/]")
    if job.start:
        model.load_adapter(loaded.model, job.start.folder)
    model.check_disk(loaded, run, num_checkpoints=section.save_total_limit + 1)  # one more while it rotates
    with processes.in_turn():
        prepared = preparation.prepare(recipe, section, job.stage.row_kind, loaded, console)
    if processes.is_first:
        prepared.report.write(run.data_report)
    prepared.train = in_order(prepared.train, section, recipe.seed)
    rows = _identify(job, prepared)

    if len(prepared.train) < processes.size:
        raise UserError(
            f"{len(prepared.train)} rows cannot be dealt to {processes.size} processes that need one each: start fewer"
        )

    trainer = build(job, loaded, prepared)
    steps = schedule.num_steps(section, len(trainer.train_dataset))
    if short := schedule.short_for_warmup(job.stage.name, section, steps):
        console.print(f"[yellow]{escape(short)}[/]")
    _check_rows(trainer.train_dataset, prepared.train, rows["train"])
    trajectory, conditions = job.trajectory(), run.conditions()
    trainer.made = Made(trajectory=trajectory, conditions=conditions)
    trainer.divergence = section.divergence if isinstance(section, AnswersSection) else None
    trainer.stop = stop
    if not processes.is_alone:
        torch.manual_seed(recipe.seed + processes.rank)  # each its own dropout
    trainer.remove_callback(PrinterCallback)
    watching = Callbacks.of(job, trainer, checkpoint, stop, started)
    for callback in watching.in_order():
        trainer.add_callback(callback)
    train_started = time.perf_counter()
    with contextlib.closing(watching), trackers.attached(trainer, job, checkpoint):
        stop.train(trainer, str(checkpoint) if checkpoint else None)
        train_seconds = time.perf_counter() - train_started
        finite.check_weights(trainer)  # what the last step made of them is in no log
        if prepared.eval is not None and not evaluated_at(
            trainer.state.log_history, trainer.state.global_step
        ):
            trainer.evaluate()
    trainer.check_equal()
    peaks, events = processes.gather(watching.timeline.peak_gib), processes.gather(trainer.recovery.events)
    report = replace(
        _report(job, trainer, loaded, train_seconds),
        measured_peak_gib=max(peaks, default=None, key=lambda peak: peak or 0.0),
        probe=watching.probe.measured,
        oom_events=[event for of_rank in events for event in of_rank],
        checkpoint_seconds=max(trainer.checkpoint_seconds, default=None),
        wall_seconds=time.monotonic() - started,
        **{extra: getattr(trainer, extra) for extra in job.stage.report_extras},
    )
    if not processes.is_first:
        return report
    run.record({"num_steps": report.num_steps, "train_tokens": report.train_tokens})
    with bar(console, "saving the adapter", None):
        mark = AdapterMark(trajectory=trajectory, conditions=conditions, num_steps=report.num_steps)
        model.save_adapter(loaded, run, mark)
    report.write(run.report)  # it says finished: not before the adapter is there
    if job.stage.answers:
        report = replace(report, answers=answers.compare(job, loaded))
    else:
        report = replace(report, scores=held_out_scores.measure(job, loaded, trainer.recovery))
    report = replace(report, wall_seconds=time.monotonic() - started)
    report.write(run.report)
    return report


def in_order(rows: Any, section: StageSection, seed: int) -> Any:
    """The rows as they are read where nothing shuffles them: those of like length together, if the recipe says so."""
    if not section.group_by_length:
        return rows
    return rows.select(grouped_by_length(rows["length"][:], section.rows_per_step, seed))


def _check_rows(trained: Any, prepared: Any, recorded: str) -> None:
    """Raises UserError unless the rows that the trainer will read are those that were recorded.

    A second for 100M tokens. Packing makes other rows of them, in this process, which nothing stored can stand for.
    """
    columns = prepared.column_names
    if len(trained) != len(prepared) or not set(columns) <= set(trained.column_names):
        return
    if fingerprint.rows(trained.select_columns(columns)) != recorded:
        raise UserError(
            "the rows that the trainer would read are not those that were prepared: a file of theirs was changed "
            "since. Run the same command again; if it says so again, check the disk and the memory of the machine"
        )


def _identify(job: Job, prepared: preparation.Prepared) -> dict[str, str]:
    """Records what the run is made from: base model, rows, the adapter that it continues. The run holds to it.

    Returns the hashes of the rows, by side. Raises UserError where that adapter was trained on another base.
    """
    path = job.recipe.model.path
    base = fingerprint.base_model(job.recipe.locate(path), job.recipe.model.revision)
    rows = {"train": fingerprint.rows(prepared.train)}
    if prepared.eval is not None:
        rows["eval"] = fingerprint.rows(prepared.eval)
    held = {"base_model.files": fingerprint.combined(base["files"]), "rows.train": rows["train"]}
    job.processes.agree("base model and rows", held | rows)
    if job.start:
        held[f"{job.start.name}{STARTED_FROM}"] = digest(job.start.folder / WEIGHTS)
        made = job.start.made()
        before = ((made and made.conditions) or {}).get("base_model.files", held["base_model.files"])
        if before != held["base_model.files"]:
            raise UserError(
                f"{job.start.folder} was trained on other files of {path} than are here now: take the revision that "
                "it was trained on, or train it again"
            )
    job.run.hold_to(held)
    job.run.record({"base_model": Base(path, **base), "rows": rows})
    return rows


def _report(job: Job, trainer: Any, loaded: model.LoadedModel, train_seconds: float) -> RunReport:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    last_eval: dict[str, float] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    return replace(
        RunReport.unknown(),
        **attempt.known(job),
        outcome="finished",
        num_steps=trainer.state.global_step,
        train_seconds=train_seconds,
        train_tokens=int(tokens[-1]) if tokens else None,
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        eval={
            key.removeprefix("eval_"): value for key, value in last_eval.items() if key.startswith("eval_")
        },
        notes=loaded.notes,
    )
