"""SIGTERM and SIGINT: the step in flight ends or is dropped, a complete checkpoint is saved, the run stops.

SIGHUP is outlived. What can be dropped: the rest of a step after the micro-batch in flight, and an evaluation.
A step of one micro-batch ends; where several processes train, any step does.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from toolkit.engine.base import ranks
from toolkit.engine.base.random_state import RandomState
from toolkit.engine.base.ranks import Ranks
from toolkit.errors import Interrupted


class Dropped(BaseException):
    """Leaves the Trainer in the middle of a step, or of an evaluation, before which the step was complete."""

    def __init__(self, is_step_complete: bool = False):
        super().__init__()
        self.is_step_complete = is_step_complete


class StopOnSignal(TrainerCallback):
    """Asks the Trainer to save and stop once a signal has come, to this process or to another of the run.

    Several processes hear of it when they sum what a step made, and stop after the same step.
    """

    def __init__(self, console: Console, processes: Ranks = ranks.ALONE):
        self._console = console
        self._processes = processes
        self._agreed: int | None = None
        self._training = False
        self._random: RandomState | None = None
        self._since = 0.0
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals in the block; a second SIGINT stops at once, as if nobody listened."""
        before = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self, trainer: Any, checkpoint: str | None) -> None:
        """Trains to the end. Raises Interrupted, with the exit code of the signal, when one came and all is saved."""
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Dropped as dropped:
            if self._random is not None and not dropped.is_step_complete:  # evaluation draws nothing
                self._random.restore()
            if trainer.state.global_step:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        self.agree()
        if number := self._told:
            raise Interrupted(
                number,
                f"stopped at step {trainer.state.global_step}, {time.monotonic() - self._since:.1f} s after "
                f"{signal.Signals(number).name}; the same command continues from there",
            )

    def agree(self) -> None:
        """Hears of the signals of the other processes; all call it at the same place."""
        if self._processes.is_alone:
            return
        if number := int(self._processes.largest(self.received or 0)):
            self._agreed, self._since = number, self._since or time.monotonic()

    @property
    def _told(self) -> int | None:
        """The signal that all processes know of."""
        return self.received if self._processes.is_alone else self._agreed

    def check(self) -> None:
        """Raises Interrupted when a signal came that ended no training: the run is finished all the same."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Interrupted(self.received, f"{name} came once the adapter was saved: the run is finished")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._random = RandomState()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run draws for the order of a new epoch again, so there the state before that draw counts.
        if not float(state.epoch or 0).is_integer():
            self._random = RandomState()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None and self._processes.is_alone:
            raise Dropped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._told is not None:
            control.should_save, control.should_training_stop = True, True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None and self._training:
            raise Dropped(is_step_complete=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received, self._since = number, time.monotonic()
        if not self._training:
            raise Interrupted(
                number, "stopped outside training; the same command begins again from what is saved"
            )
        self._console.print(
            f"[yellow]{signal.Signals(number).name}: the step in flight ends, then a checkpoint is saved "
            "(Ctrl-C again stops at once)[/]"
        )
