"""One training stage from recipe to report: what SFT and DPO share, in the order it happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, set_seed

from toolkit import env, hardware, manifest
from toolkit.engine import checkpoints, data, model, probe, recompute, vram
from toolkit.engine.interrupt import StopOnSignal
from toolkit.engine.progress import Metrics
from toolkit.length_groups import grouped_by_length
from toolkit.memory import Plan
from toolkit.recipe import Recipe, StageName
from toolkit.rundir import RunDir, write_json, write_text

# (loaded model, prepared data, run directory, console) -> a Trainer that is ready to train
BuildTrainer = Callable[[model.Loaded, data.Prepared, RunDir, Console], Any]


def run(
    recipe: Recipe,
    name: StageName,
    plan: Plan,
    run: RunDir,
    console: Console,
    build: BuildTrainer,
    fresh: bool = False,
) -> dict[str, Any]:
    """Trains one stage, or goes on where it stopped, and saves its adapter. Returns what report.json holds.

    Raises UserError for whatever the user can mend and Interrupted after a signal; nothing in the run directory
    looks finished then.
    """
    stop = StopOnSignal(console)
    with run.locked(), stop.listening():
        return _run(recipe, name, plan, run, console, build, fresh, stop)


def _run(
    recipe: Recipe,
    name: StageName,
    plan: Plan,
    run: RunDir,
    console: Console,
    build: BuildTrainer,
    fresh: bool,
    stop: StopOnSignal,
) -> dict[str, Any]:
    started = time.perf_counter()
    stage, starting_adapter = recipe.stage(name), run.starting_adapter(recipe.sft is not None)
    moved = run.start(recipe.trajectory(name), fresh)
    if moved:
        console.print(f"[dim]the run that was there is now {moved}[/]")
    checkpoint = checkpoints.latest(run.checkpoints, console)
    write_text(run.path / "recipe.resolved.yaml", recipe.to_yaml())
    described = manifest.describe(recipe, hardware.here(), env.require_prepared())
    run.record(
        described
        | {"outcome": "running", "started": manifest.now(), "resumed_from": checkpoint and checkpoint.name}
    )
    set_seed(recipe.seed)

    console.print(f"[dim]loading {recipe.model.path}[/]")
    loaded = model.load(recipe, stage.max_length, plan.settings)
    for note in loaded.notes:
        console.print(f"[yellow]{note}[/]")
    model.attach_lora(loaded, recipe, plan.settings, stage.max_length)
    if starting_adapter:
        model.load_adapter(loaded.model, starting_adapter)
    model.check_disk(loaded, run, num_checkpoints=stage.save_total_limit + 1)  # one more while it rotates
    prepared = data.prepare(recipe, name, loaded, console)
    write_json(run.path / "data_report.json", prepared.report)
    if stage.group_by_length:
        order = grouped_by_length(prepared.train["length"][:], stage.effective_batch_size, recipe.seed)
        prepared.train = prepared.train.select(order)

    trainer = build(loaded, prepared, run, console)
    trainer.remove_callback(PrinterCallback)
    layers = recompute.Recompute(plan.settings.checkpoint_layers)
    probed = probe.Probe(trainer, layers, plan.peak_gib, plan.items_gib["optimizer"])
    resumed_step = checkpoints.step_of(checkpoint) if checkpoint else 0
    timeline, metrics = vram.Timeline(), Metrics(run.metrics, console, name, resumed_step)
    for callback in (layers, probed, timeline, metrics, stop):  # each relies on the ones before
        trainer.add_callback(callback)
    if checkpoint:
        console.print(f"[green]continuing at step {resumed_step}[/] from {checkpoint}")
    train_started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.raise_if_received(trainer.state.global_step)
        train_seconds = time.perf_counter() - train_started
        if prepared.eval is not None:
            trainer.evaluate()
    finally:
        metrics.close()
    report = _report(recipe, name, plan, trainer, loaded, train_seconds) | {
        "measured_peak_gib": timeline.peak_gib,
        "probe": probed.measured,
        "oom_events": trainer.recovery.events,
    }
    model.save_adapter(loaded, run, {"trajectory": recipe.trajectory(name), "num_steps": report["num_steps"]})
    report["wall_seconds"] = time.perf_counter() - started
    write_json(run.report, report)
    run.record({"outcome": "finished", "ended": manifest.now(), "num_steps": report["num_steps"]})
    return report


def _report(
    recipe: Recipe, name: StageName, plan: Plan, trainer: Any, loaded: model.Loaded, train_seconds: float
) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    last_eval = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    return {
        "stage": name,
        "outcome": "finished",
        "recipe": recipe.name,
        "device": model.device_name(),
        "num_steps": trainer.state.global_step,
        "wall_seconds": None,
        "train_seconds": train_seconds,
        "train_tokens": int(tokens[-1]) if tokens else None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval": {
            key.removeprefix("eval_"): value for key, value in last_eval.items() if key.startswith("eval_")
        },
        "settings": asdict(plan.settings),
        "planned_peak_gib": plan.peak_gib,
        "allocator": env.require_prepared().to_dict() | {"effective": vram.allocator_settings()},
        "notes": loaded.notes,
    }
