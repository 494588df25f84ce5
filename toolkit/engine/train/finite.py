"""A loss or gradient that stopped being a number ends the run, and never reaches a checkpoint; a loss out of its range
ends it too.

Nothing waits for the GPU on its account. The Trainer reads loss and gradient norm at every `logging_steps`, where the
sum of all losses since the last time is NaN once one was; a checkpoint reads all weights anyway. So a run goes wrong
for at most `logging_steps` steps, and the losses kept here say in which of them it began.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import TrainerCallback

from toolkit.engine.train import pieces
from toolkit.errors import UserError
from toolkit.run.rundir import saved_steps
from toolkit.training import divergence

SHOWN_ROWS, SHOWN_IDS = 4, 24  # of the rows that a message names, and of the tokens that they begin with


class Finite(TrainerCallback):
    """Looks at every log of training."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                stop(self._trainer, f"{name} is {logs[name]}", self._first_of_all())
        self._trainer.ran.clear()
        self._check_range(state.log_history)

    def _first_of_all(self) -> Began:
        """Where it went wrong, of several processes in the first one that knows."""
        trainer, own = self._trainer, _rows_of(self._trainer)
        named = trainer.processes.gather(_named(trainer, own.rows) if _first(trainer.ran) else "")
        return own._replace(named=next(filter(None, named), None))

    def _check_range(self, history: divergence.History) -> None:
        limits = self._trainer.divergence
        outside = divergence.strays(history, limits)
        if limits is not None and len(outside) >= limits.patience:
            stop(
                self._trainer,
                f"the loss has left its range: {outside[-1]['loss']:.4g} is more than {limits.factor:g} times that of "
                f"the first step, {divergence.first_loss(history):.4g}, for {len(outside)} lines of the log in a row "
                f"(divergence.factor, divergence.patience)",
            )


def check_weights(trainer: Any) -> None:
    """Raises UserError when a trained weight, or what the optimizer keeps of it, is NaN or infinite."""
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not _all_finite(parameter.detach() for parameter in parameters):
        stop(trainer, "trained weights are NaN or infinite", _rows_of(trainer))
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    kept = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
    if not _all_finite(tensor for tensor in kept if tensor.is_floating_point()):
        stop(trainer, "the optimizer's state is NaN or infinite", _rows_of(trainer))


def stop(trainer: Any, what: str, began: Began | None = None) -> NoReturn:
    """Raises UserError with the step, the rows in which it `began` where that is known, and what to do."""
    step = began.step if began else trainer.state.global_step
    group = trainer.optimizer.param_groups[0] if trainer.optimizer is not None else {"lr": 0.0}
    limit, rate = trainer.args.max_grad_norm, trainer.args.learning_rate
    until = divergence.good_until(trainer.state.log_history, trainer.divergence)
    saved = saved_steps(Path(trainer.args.output_dir))
    good = max((one for one in saved if until is None or one <= until), default=None)
    rows = f"; rows: {began.named or _named(trainer, began.rows)}" if began else ""
    raise UserError(
        f"training went wrong at step {step}: {what}. Learning rate now: {group['lr']:g} of {rate:g}{rows}. Lower "
        f"learning_rate, raise warmup_steps or lower max_grad_norm ({limit:g})"
        f"{', or take the rows out if it is they' if began else ''}, and start again with --fresh. "
        + (
            f"The last good checkpoint, of step {good}, is kept"
            if good is not None
            else f"No {'good ' if saved else ''}checkpoint was saved yet"
        )
    )


class Began(NamedTuple):
    """Where it went wrong first."""

    step: int
    rows: list[dict[str, Any]]
    named: str | None = None


def _rows_of(trainer: Any) -> Began:
    """The first micro-batch whose loss is no number; else all of the step."""
    began = _first(trainer.ran)
    if began:
        return Began(began.step, began.rows)
    step = trainer.state.global_step
    return Began(step, [row for ran in trainer.ran if ran.step == step for row in ran.rows])


def _first(ran: Any) -> pieces.Ran | None:
    """The first micro-batch whose loss is no number."""
    if not ran:
        return None
    finite = torch.stack([one.loss.float() for one in ran]).isfinite().tolist()
    return next((one for one, is_finite in zip(ran, finite, strict=True) if not is_finite), None)


def _all_finite(tensors: Iterator[torch.Tensor]) -> bool:
    """One answer from the device for all of them."""
    found = [tensor.isfinite().all() for tensor in tensors]
    return not found or bool(torch.stack([one.to(found[0].device) for one in found]).all())


def _named(trainer: Any, rows: list[dict[str, Any]]) -> str:
    """Where rows stand among the prepared ones, and how they begin."""
    if not rows:
        return "unknown"
    shown = rows[:SHOWN_ROWS]
    named = [
        f"prepared row {'?' if place is None else place} "
        f"({trainer.processing_class.decode(pieces.ids_of(row)[0][:SHOWN_IDS])!r} ...)"
        for row, place in zip(shown, pieces.places(trainer.train_dataset, shown), strict=True)
    ]
    return ", ".join(named) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")
