"""What each reward does over a run: whether it teaches anything, where it began and ended, and the held-out measure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from toolkit.evaluation.intervals import PerRow, Resampled
from toolkit.recipe.rl_section import TRUNCATED
from toolkit.records.evaluation_report import Measure, PairedMeasure
from toolkit.records.record import plain

QUIET_LOGS = 3  # lines of the log without any spread, after which a reward is said to teach nothing


class RewardWatch(TrainerCallback):
    """Looks at every log; what it finds goes into the trainer's `told`."""

    def __init__(self, trainer: Any, names: list[str], console: Console):
        self._trainer, self._names, self._console = trainer, names, console
        self._flat = dict.fromkeys(names, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = self._trainer.told
        if left_out := told["prompts_left_out_of_an_epoch"]:
            others = ", others each time" * self._trainer.shuffle_dataset
            self._console.print(
                f"[dim]{left_out} of {told['prompts']:,} prompts fill no step and are left out of each epoch{others}[/]"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in self._names:
            spread = logs.get(f"rewards/{name}/spread")
            if spread is None:
                continue
            self._flat[name] = 0 if spread else self._flat[name] + 1
            if self._flat[name] == QUIET_LOGS and name != TRUNCATED:
                self._console.print(
                    f"[yellow]the reward {escape(name)} is the same for all completions of each prompt (step "
                    f"{state.global_step}): it teaches nothing while that lasts[/]"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told, history = self._trainer.told, state.log_history
        told["rewards"] = {name: _course(history, f"rewards/{name}") for name in self._names}
        told["reward"] = _ends(history, "reward")


def held_out_correct(right: dict[int, list[bool | None]], seed: int) -> dict[str, Any] | None:
    """Sampled correctness at the first and the last evaluation, and their difference row by row; None without two."""
    if len(right) < 2:
        return None
    first, last = min(right), max(right)
    known = [at for at, one in enumerate(right[first]) if one is not None]
    rows: dict[Hashable, PerRow] = {
        name: PerRow.fraction(np.array([bool(right[step][at]) for at in known]))
        for name, step in (("before", first), ("after", last))
    }
    resampled = Resampled(rows, seed)
    found: dict[str, Any] = {
        "steps": [first, last],
        **{name: plain(Measure(*resampled.interval(name))) for name in ("before", "after")},
        "difference": plain(PairedMeasure(*resampled.difference("after", "before"))),
    }
    return found


def _course(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    spreads = [entry[f"{key}/spread"] for entry in history if entry.get(f"{key}/spread") is not None]
    return _ends(history, f"{key}/mean") | {"spread": sum(spreads) / len(spreads) if spreads else None}


def _ends(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    values = [entry[key] for entry in history if entry.get(key) is not None and "loss" in entry]
    return {"first": values[0], "last": values[-1]} if values else {"first": None, "last": None}
