"""How long the rest of a run takes: its steps, the evaluations between and after them, and the answers at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of a step's time for as many rows: a forward pass is a third of one with backward. Until one was measured.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Ahead:
    """What a run does beside its steps. `evaluation_steps`: as many rows as so many steps have; 0 for none held out.

    An evaluation comes every `eval_steps` steps (None: only at the end). `answers_seconds` as an earlier run took.
    """

    evaluation_steps: float = 0.0
    eval_steps: int | None = None
    answers_seconds: float = 0.0

    def num_evaluations(self, step: int, num_steps: int) -> int:
        """Those behind `step`; the run ends with one."""
        if not self.evaluation_steps:
            return 0
        every = self.eval_steps or num_steps
        return num_steps // every - step // every + bool(num_steps % every)


NOTHING = Ahead()


class Pace:
    """Times are seconds of one clock; what `paused` says is no part of a step.

    The first step of a process compiles and warms up: once there are others, it does not count.
    """

    def __init__(self, step: int, now: float, ahead: Ahead = NOTHING):
        self.began = self._last = now
        self._step, self._ahead = step, ahead
        self._first: float | None = None
        self._paused = 0.0
        self._evaluation_seconds: float | None = None
        # of the steps that count: how many, their seconds, the squares of these
        self._num, self._sum, self._squares = 0, 0.0, 0.0

    def reached(self, step: int, now: float) -> None:
        seconds = max(0.0, now - self._last - self._paused) / max(1, step - self._step)
        if self._first is None:
            self._first = seconds
        else:
            num = step - self._step
            self._num, self._sum = self._num + num, self._sum + num * seconds
            self._squares += num * seconds**2
        self._step, self._last, self._paused = step, now, 0.0

    def paused(self, seconds: float) -> None:
        """Since the last step, with an evaluation or a checkpoint."""
        self._paused += seconds

    def evaluated(self, seconds: float) -> None:
        self._evaluation_seconds = seconds

    @property
    def num_counted(self) -> int:
        return self._num

    @property
    def step_seconds(self) -> float | None:
        """The mean; of the first step where that is all, None before it is done."""
        return self._sum / self._num if self._num else self._first

    @property
    def step_error(self) -> float:
        """The standard error of that mean; NaN for fewer than two steps."""
        if self._num < 2:
            return math.nan
        variance = (self._squares - self._sum**2 / self._num) / (self._num - 1)
        return math.sqrt(max(0.0, variance) / self._num)

    def steps_ahead(self, num_steps: int) -> float:
        """Those that are left, and what the evaluations take that nobody has measured yet, counted in steps."""
        left = float(num_steps - self._step)
        if self._evaluation_seconds is None:
            evaluations = self._ahead.num_evaluations(self._step, num_steps)
            left += evaluations * self._ahead.evaluation_steps * FORWARD_SHARE
        return left

    def beside_seconds(self, num_steps: int) -> float:
        """What is known in seconds: measured evaluations, and answers."""
        evaluations = self._ahead.num_evaluations(self._step, num_steps)
        return evaluations * (self._evaluation_seconds or 0.0) + self._ahead.answers_seconds

    def remaining_seconds(self, num_steps: int, now: float) -> float | None:
        """To the end of the run; None before the first step is done."""
        if self.step_seconds is None:
            return None
        left = self.steps_ahead(num_steps) * self.step_seconds + self.beside_seconds(num_steps)
        return max(0.0, left - max(0.0, now - self._last - self._paused))
