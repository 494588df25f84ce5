"""Said once, after the first minute: how long the run takes to its end, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from toolkit.console.pace import Ahead, Pace
from toolkit.console.panel import duration
from toolkit.evaluation.intervals import student_quantile
from toolkit.records.run_report import RunReport
from toolkit.training.job import Job

AFTER_SECONDS, AFTER_STEPS = 60, 3  # of steps that count: the first one compiles


@dataclass(frozen=True)
class Forecast:
    """Seconds to the end with the 95 % interval that the spread of the steps gives."""

    seconds: float
    low: float
    high: float

    @classmethod
    def of(cls, pace: Pace, num_steps: int, now: float) -> Forecast | None:
        """None while too little is known."""
        if now - pace.began < AFTER_SECONDS or pace.num_counted < AFTER_STEPS or math.isnan(pace.step_error):
            return None
        seconds = pace.remaining_seconds(num_steps, now)
        if not seconds:
            return None
        reach = student_quantile(pace.num_counted - 1) * pace.step_error * pace.steps_ahead(num_steps)
        return cls(seconds, max(0.0, seconds - reach), seconds + reach)

    def line(self, spent_seconds: float, price_per_hour: float | None, now: datetime | None = None) -> str:
        """`about 3 h 12 min more (3 h 05 min to 3 h 20 min), until 18:40 UTC; ...`; what is spent costs, too."""
        end = (now or datetime.now(UTC)) + timedelta(seconds=self.seconds)
        text = (
            f"about {duration(self.seconds)} more ({duration(self.low)} to {duration(self.high)}) with evaluation and "
            f"answers: until {end:%d %b %H:%M} UTC"
        )
        if price_per_hour is None:
            return text
        cost, low, high = (
            (spent_seconds + seconds) / 3600 * price_per_hour
            for seconds in (self.seconds, self.low, self.high)
        )
        return f"{text}; costs {cost:.2f} ({low:.2f} to {high:.2f}) at {price_per_hour:g} an hour"


def ahead_of(job: Job, trainer: Any) -> Ahead:
    """What the run will do beside its steps. Its answers take as long as those of the latest run of the recipe took."""
    section, rows = job.section, trainer.eval_dataset
    answers = [
        (run.report.stat().st_mtime, report.answers.seconds)
        for run in map(job.run.of, job.run.variants())
        if (report := RunReport.load(run.report)) and report.answers and report.answers.seconds
    ]
    return Ahead(
        0.0 if rows is None else len(rows) / section.effective_batch_size,
        section.eval_steps if rows is not None else None,
        max(answers)[1] if answers and job.stage.answers else 0.0,
    )
