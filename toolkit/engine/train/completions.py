"""What is kept of completions: samples for a reader, and whether those to held-out prompts were right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from toolkit.data.prompts import last_turn
from toolkit.files import finite, write_text
from toolkit.records.record import read_lines
from toolkit.redaction import blanked
from toolkit.rewards.rules import Completion
from toolkit.run.journal import Journal
from toolkit.run.runlog import OURS

SHOWN = ("best", "median", "worst")


class Completions(TrainerCallback):
    """Writes completions.jsonl: at every step that is logged, the best, the median and the worst of it.

    `right` is, for each evaluation by its step, whether each held-out completion was right: None where nobody knows.
    """

    def __init__(self, file: Path, held_out: Path, logging_steps: int, warn: Callable[[str], None]):
        self._file, self._held_out, self._logging_steps = file, held_out, logging_steps
        self._journal, self._evaluations = Journal(file, warn), Journal(held_out, warn)
        self._heard: list[Completion] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what a resumed run does again, and a line that a kill left half-written."""
        for file in (self._file, self._held_out):
            if file.is_file():
                kept = (json.dumps(line) + "\n" for line in _up_to(file, state.global_step))
                write_text(file, "".join(kept))

    def take(
        self,
        step: int,
        mode: str,
        found: Sequence[Completion],
        names: Sequence[str],
        rewards: Sequence[Sequence[float]],
        totals: Sequence[float],
    ) -> None:
        """Keeps what was generated and scored in one go."""
        if mode == "eval":
            self._heard += found
            return
        if step != 1 and step % self._logging_steps:
            return
        order = sorted(range(len(found)), key=totals.__getitem__)
        for what, at in zip(SHOWN, (order[-1], order[len(order) // 2], order[0]), strict=True):
            one = found[at]
            line = {
                "step": step,
                "which": what,
                "prompt": last_turn(one.prompt),
                "text": one.text,
                "num_tokens": one.num_tokens,
                "ended": one.ended,
                "right": one.is_right,
                "reward": totals[at],
                "rewards": dict(zip(names, rewards[at], strict=True)),
            }
            self._journal.write(finite(blanked(line)))
            OURS.info("step %d, %s completion, reward %.3g: %s", step, what, totals[at], blanked(one.text))

    def begin_evaluation(self) -> None:
        self._heard = []

    def end_evaluation(self, step: int) -> None:
        right = [one.is_right for one in self._heard]
        if any(one is not None for one in right):
            self._evaluations.write({"step": step, "right": right})

    def right(self) -> dict[int, list[bool | None]]:
        return {line["step"]: line["right"] for line in _up_to(self._held_out, None)}


def _up_to(file: Path, step: int | None) -> list[dict[str, Any]]:
    return [
        line
        for line in read_lines(file)
        if isinstance(at := line.get("step"), int) and (step is None or at <= step)
    ]
