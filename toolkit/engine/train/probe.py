"""The probe: the longest micro-batch of the epoch, forward and backward once, before the first step.

What does not fit shows within seconds of training, not after an hour, and the settings have stepped down by
then. Weights, gradients, RNG, metrics and the order of rows are as if it had not been.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.engine.base import recompute
from toolkit.engine.base.micro_batches import row_tokens
from toolkit.engine.base.random_state import RandomState
from toolkit.hardware import GIB
from toolkit.records import run_report as record


class Probe(TrainerCallback):
    """Runs when training begins, after `layers` has set its flags.

    `optimizer_gib` stands in for optimizer states that exist only after the first step; a GPU holds that much
    beside the probe. `measured` is None until it ran.
    """

    def __init__(self, trainer: Any, layers: recompute.Recompute, planned_gib: float, optimizer_gib: float):
        self._trainer = trainer
        self._layers = layers
        self._planned_gib = planned_gib
        self._optimizer_gib = optimizer_gib
        self.measured: record.Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, started = self._trainer, time.perf_counter()
        rows = trainer.longest_rows(args.per_device_train_batch_size)
        rows = rows[: trainer.micro_batches.first(rows, len(rows))]
        recovery, num_events = trainer.recovery, len(trainer.recovery.events)
        with recovery.during("probe"), unchanged(trainer), self._ballast():
            run(trainer, rows)
        events = recovery.events[num_events:]
        if recovery.most_recomputing > self._layers.count:
            self._layers.count, num_layers = recovery.most_recomputing, len(recompute.layers(trainer.model))
            recompute.recompute(trainer.model, self._layers.count)
            recovery.console.print(
                f"[yellow]probe: {self._layers.count} of {num_layers} layers recompute in this run[/]"
            )
        on_gpu = torch.cuda.is_available()
        self.measured = record.Probe(
            rows=len(rows),
            tokens=sum(row_tokens(row) for row in rows),
            peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
            planned_peak_gib=self._planned_gib,
            split_factor=recovery.split["train"],
            recompute_layers=self._layers.count,
            events=len(events),
            seconds=time.perf_counter() - started,
        )

    @contextlib.contextmanager
    def _ballast(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        held = torch.empty(int(self._optimizer_gib * GIB), dtype=torch.uint8, device="cuda")
        yield
        del held


def run(trainer: Any, rows: list[dict[str, Any]]) -> None:
    """One training step's forward and backward on `rows`, recovery included."""
    batch = trainer.batch_of(rows)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], trainer.args.device))


@contextlib.contextmanager
def unchanged(trainer: Any) -> Iterator[None]:
    """Whatever trains in the block, it leaves no gradient, no random number drawn and nothing logged."""
    generators = RandomState()
    log, tokens = trainer._metrics["train"], trainer._total_train_tokens
    trainer._metrics["train"] = defaultdict(list)
    was_training = trainer.model.training
    try:
        yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train(was_training)
        trainer._metrics["train"], trainer._total_train_tokens = log, tokens
        generators.restore()
