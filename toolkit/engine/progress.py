"""What a run shows and writes while it trains: metrics.jsonl, one line or one bar, nothing from the libraries."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from toolkit.engine.checkpoints import step_of
from toolkit.rundir import finite, write_text

SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("rewards/margins", "margin", "{:.3f}"),
    ("rewards/accuracies", "accuracy", "{:.0%}"),
    ("eval_loss", "eval loss", "{:.4f}"),
    ("eval_rewards/margins", "eval margin", "{:.3f}"),
    ("eval_rewards/accuracies", "eval accuracy", "{:.0%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


@contextlib.contextmanager
def bar(console: Console, title: str, total: int | None) -> Iterator[Any]:
    """A progress bar on a terminal; elsewhere one line at the start. Yields a function that advances it."""
    if not console.is_terminal:
        console.print(title)
        yield lambda count=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count=1: progress.advance(task, count)


class Metrics(TrainerCallback):
    """Writes every log of the Trainer to metrics.jsonl under its own names, and shows the main ones."""

    def __init__(self, path: Path, console: Console, title: str, checkpoint: Path | None):
        _forget_after(path, step_of(checkpoint) if checkpoint else 0)
        self._checkpoint = checkpoint
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._console = console
        self._title = title
        self._progress: Progress | None = None
        self._last = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = (time.perf_counter(), state.num_input_tokens_seen or 0.0)
        if self._checkpoint:
            self._console.print(
                f"[green]continuing at step {state.global_step:,} of {state.max_steps:,}[/] from {self._checkpoint}"
            )
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task(
                self._title, total=state.max_steps, completed=state.global_step
            )
            self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "num_tokens" in logs and "loss" in logs:
            now, before = (time.perf_counter(), logs["num_tokens"]), self._last
            logs["tokens_per_second"] = (now[1] - before[1]) / max(now[0] - before[0], 1e-9)
            self._last = now
        entry = finite({"step": state.global_step, **logs})
        self._stream.write(json.dumps(entry) + "\n")
        shown = [f"{label} {style.format(logs[key])}" for key, label, style in SHOWN if key in logs]
        if shown and not {"train_runtime"} & logs.keys():
            self._console.print(
                f"[dim]{self._title}[/] {state.global_step:>5}/{state.max_steps}  " + "  ".join(shown),
                highlight=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._stream.flush()


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run does again, and one that a kill left half-written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError):
            if line and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
