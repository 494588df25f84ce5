"""SIGTERM and SIGINT: the step in flight ends or is dropped, a complete checkpoint is saved, the run stops.

SIGHUP is outlived. What can be dropped: the rest of a step after the micro-batch in flight, and an evaluation.
A step of one micro-batch ends.
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

from toolkit.engine.base.random_state import RandomState
from toolkit.errors import Interrupted


class Dropped(BaseException):
    """Leaves the Trainer in the middle of a step or of an evaluation."""


class StopOnSignal(TrainerCallback):
    """Asks the Trainer to save and stop once a signal has come."""

    def __init__(self, console: Console):
        self._console = console
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
        except Dropped:
            if self._random is not None:
                self._random.restore()
            if trainer.state.global_step:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        if self.received is not None:
            raise Interrupted(
                self.received,
                f"stopped at step {trainer.state.global_step}, {time.monotonic() - self._since:.1f} s after "
                f"{signal.Signals(self.received).name}; the same command continues from there",
            )

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
        if self.received is not None:
            raise Dropped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save, control.should_training_stop = True, True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None and self._training:
            self._random = None  # the step is complete, and evaluation draws nothing more
            raise Dropped

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
