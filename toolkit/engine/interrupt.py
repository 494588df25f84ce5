"""SIGTERM and SIGINT: the step in flight ends, a whole checkpoint is saved, the run stops. SIGHUP is outlived."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from toolkit.errors import Interrupted


class StopOnSignal(TrainerCallback):
    """Asks the Trainer to save and stop at the end of the step in which a signal came."""

    def __init__(self, console: Console):
        self._console = console
        self._training = False
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

    def raise_if_received(self, step: int) -> None:
        """Raises Interrupted, with the exit code of the signal, when one came."""
        if self.received is not None:
            raise Interrupted(self.received, f"stopped at step {step}; the same command continues from there")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if not self._training:
            raise Interrupted(
                number, "stopped outside training; the same command begins again from what is saved"
            )
        self._console.print(
            f"[yellow]{signal.Signals(number).name}: the step in flight ends, then a checkpoint is saved "
            "(Ctrl-C again stops at once)[/]"
        )
