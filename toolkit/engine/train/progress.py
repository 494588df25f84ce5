"""What a run shows and writes while it trains: metrics.jsonl, and a live panel or one line an interval."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from toolkit.console import panel
from toolkit.console.pace import NOTHING, Ahead, Pace
from toolkit.console.screen import is_live, live
from toolkit.engine.train.checkpoints import step_of
from toolkit.engine.train.forecast import Forecast
from toolkit.errors import UserError
from toolkit.files import finite, write_text
from toolkit.hardware import GIB
from toolkit.recipe.stages import PanelField
from toolkit.records.record import read_lines
from toolkit.run.journal import Journal
from toolkit.run.rundir import PREFIX
from toolkit.run.runlog import OURS

DRAWN_PER_SECOND = 2  # 1.9 ms each: 0.4% of a core, while the other threads go on


def evaluated_at(history: list[dict[str, Any]], step: int) -> bool:
    """Whether a Trainer's log has an evaluation of that step."""
    return any("eval_loss" in entry and entry["step"] == step for entry in history)


class LastLog(TrainerCallback):
    """A log at the last step: else the steps since the one before are in none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps


class Metrics(TrainerCallback):
    """Writes every log of the Trainer to metrics.jsonl under its own names, and shows how the run goes.

    Adds `tokens_per_second`, of the time in which it trained: evaluating and saving do not count.
    """

    def __init__(
        self,
        path: Path,
        console: Console,
        title: str,
        fields: tuple[PanelField, ...],
        checkpoint: Path | None,
        ahead: Ahead = NOTHING,
        price_per_hour: float | None = None,
    ):
        self._history = _forget_after(path, checkpoint)
        self._checkpoint = checkpoint
        self._journal = Journal(path, lambda problem: console.print(f"[yellow]{escape(problem)}[/]"))
        self._console = console
        self._title, self._fields = title, fields
        self._ahead, self._price_per_hour = ahead, price_per_hour
        self._is_forecast = False
        self._live: Live | None = None
        self._state: panel.State | None = None
        self._tokens = 0.0
        self._since = self._step_ended = self._idle = 0.0
        self._paused = False

    # What the Trainer calls, in its order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since, self._tokens = time.perf_counter(), state.num_input_tokens_seen
        self._step_ended = self._since
        self._state = shown = panel.State(
            self._title,
            self._fields,
            state.max_steps,
            None if args.max_steps > 0 else args.num_train_epochs,
            Pace(state.global_step, self._since, self._ahead),
        )
        shown.step, shown.epoch = state.global_step, state.epoch or 0.0
        if self._checkpoint:
            shown.saved_step = state.global_step
            self._console.print(
                f"[green]continuing at step {state.global_step:,} of {state.max_steps:,}[/] from "
                f"{escape(str(self._checkpoint))}"
            )
        for entry in self._history:
            self._remember(entry)
        if is_live(self._console):
            self._live = live(self._console, self._draw, DRAWN_PER_SECOND)
            self._live.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._paused:
            idle = time.perf_counter() - self._step_ended
            self._idle += idle
            self._paused = False
            if self._state:
                self._state.pace.paused(idle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._state is not None
        self._step_ended = time.perf_counter()
        self._state.step, self._state.epoch = state.global_step, state.epoch or 0.0
        self._state.pace.reached(state.global_step, self._step_ended)
        self._forecast(state.max_steps)
        if control.should_evaluate:
            self._state.doing = ("evaluating", 0, None)
        elif control.should_save:
            self._state.doing = ("saving a checkpoint", 0, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "num_tokens" in logs and "loss" in logs:
            now = time.perf_counter()
            seconds = now - self._since - self._idle
            logs["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / max(seconds, 1e-9)
            self._since, self._idle, self._tokens = now, 0.0, logs["num_tokens"]
        self._journal.write(finite({"step": state.global_step, **logs}))
        self._remember(logs)
        pace = self._state.pace if self._state else None
        left = pace.remaining_seconds(state.max_steps, time.perf_counter()) if pace else None
        text = panel.line(state.global_step, state.max_steps, logs, self._fields, left)
        if text and "train_runtime" not in logs:
            self._say(text, shown="eval_loss" in logs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._state is None:
            return
        self._paused = True
        _, done, total = self._state.doing or ("", 0, None)
        with contextlib.suppress(TypeError):  # a stream has no length
            total = len(eval_dataloader)
        self._state.doing = ("evaluating", done + 1, total)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._state is not None:
            self._state.doing = ("saving a checkpoint", 0, None) if control.should_save else None
            self._state.pace.evaluated(time.perf_counter() - self._step_ended)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._state is not None
        self._state.doing, self._paused = None, True
        if (Path(args.output_dir) / f"{PREFIX}{state.global_step}").is_dir():  # a full disk costs one
            self._state.saved_step = state.global_step
            self._say(f"checkpoint of step {state.global_step:,} saved", shown=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live and self._state is not None:  # what stays of the panel
            self._console.print(panel.closing(self._state, time.perf_counter(), self._console.width))

    def close(self) -> None:
        """Takes the panel off the terminal, whatever ended the training."""
        if self._live:
            self._live.stop()
            self._live = None

    # What they show

    def _draw(self) -> Any:
        assert self._state is not None
        return panel.draw(self._state, time.perf_counter(), *self._console.size)

    def _remember(self, logs: dict[str, Any]) -> None:
        if self._state is None or "loss" not in logs:
            return
        if not torch.cuda.is_available():
            logs = {**logs, "ram_gib": psutil.Process().memory_info().rss / GIB}
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        self._state.latest = numbers
        for shown in self._fields:
            if shown.has_curve and shown.key in numbers:
                self._state.curves.setdefault(shown.label, panel.Curve()).append(numbers[shown.key])

    def _forecast(self, num_steps: int) -> None:
        """Once, as soon as enough is known."""
        assert self._state is not None
        pace = self._state.pace
        found = None if self._is_forecast else Forecast.of(pace, num_steps, self._step_ended)
        if found:
            self._is_forecast = True
            self._say(found.line(self._step_ended - pace.began, self._price_per_hour), shown=True)

    def _say(self, text: str, shown: bool) -> None:
        """A line; where the panel stands it goes to log.txt only, unless it is worth keeping on the screen."""
        if self._live and not shown:
            OURS.info("%s  %s", self._title, text)
        else:
            self._console.print(f"[dim]{escape(self._title)}[/]  {escape(text)}")


def _forget_after(path: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Drops the lines of what a resumed run does again, and one that a kill left half-written.

    Of the checkpoint's own step that is an evaluation that it does not know of, and the summary at the end. Returns
    the entries that stay.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path} is no file, and the run writes its metrics there: move it away")
    step, is_evaluated = step_of(checkpoint), False
    if checkpoint:
        history = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
        is_evaluated = evaluated_at(history, step)

    def stays(entry: dict[str, Any]) -> bool:
        at = entry.get("step")
        if not isinstance(at, int) or at > step:
            return False
        return at < step or "loss" in entry or (is_evaluated and "eval_loss" in entry)

    kept = [entry for entry in read_lines(path) if stays(entry)]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
