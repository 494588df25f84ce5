"""What runs beside the Trainer's steps, and in which order: each relies on those before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from toolkit.engine.base import recompute, vram
from toolkit.engine.train import checkpoints, finite, forecast, probe
from toolkit.engine.train.interrupt import StopOnSignal
from toolkit.engine.train.progress import LastLog, Metrics
from toolkit.training.job import Job


@dataclass(frozen=True)
class Callbacks:
    """One of each; `in_order` is the order in which the Trainer calls them. Metrics has the first process alone."""

    layers: recompute.Recompute
    probe: probe.Probe
    clock: checkpoints.CheckpointClock
    timeline: vram.Timeline
    last_log: LastLog
    metrics: Metrics | None
    finite: finite.Finite
    stop: StopOnSignal

    @classmethod
    def of(
        cls, job: Job, trainer: Any, checkpoint: Path | None, stop: StopOnSignal, started: float
    ) -> Callbacks:
        plan, run = job.plan, job.run
        layers = recompute.Recompute(plan.settings.recompute_layers)
        return cls(
            layers,
            probe.Probe(trainer, layers, plan.peak_gib, plan.items_gib["optimizer"]),
            checkpoints.CheckpointClock(trainer, job.section, run, started),
            vram.Timeline(),
            LastLog(),
            Metrics(
                run.metrics,
                job.console,
                f"{run.name} · {job.recipe.name}",
                job.stage.panel_fields,
                checkpoint,
                forecast.ahead_of(job, trainer),
                plan.price_per_hour,
            )
            if trainer.processes.is_first
            else None,
            finite.Finite(trainer),
            stop,
        )

    def in_order(self) -> tuple[TrainerCallback, ...]:
        """With the reason of each place."""
        order = (
            self.layers,  # sets which layers recompute: the probe measures with them
            self.probe,  # its peak is no part of the run: the timeline resets it after
            self.clock,  # asks for checkpoints and adds their seconds to a log that metrics writes
            self.timeline,  # adds the memory to the same log
            self.last_log,  # asks for a log before metrics says that a checkpoint is being saved
            self.metrics,  # writes and shows the log once the others have added to it
            self.finite,  # ends the run at a log that is no number, once metrics has written it
            self.stop,  # last: a signal overrides what the others asked for
        )
        return tuple(callback for callback in order if callback is not None)

    def close(self) -> None:
        """Takes the panel off the terminal, whatever ended the training."""
        if self.metrics:
            self.metrics.close()
