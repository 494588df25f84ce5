"""What a run says of its time and cost: after the first minute, to the end of it all."""

from datetime import UTC, datetime

import pytest

from toolkit.console.pace import Ahead, Pace
from toolkit.engine.train.forecast import Forecast


def paced(seconds: list[float], ahead: Ahead) -> tuple[Pace, float]:
    pace, now = Pace(0, 0.0, ahead), 0.0
    for step, taken in enumerate(seconds, 1):
        now += taken
        pace.reached(step, now)
    return pace, now


def test_it_waits_for_a_minute_and_for_steps_that_count() -> None:
    assert Forecast.of(*_at(paced([30.0, 10.0, 12.0], Ahead()))) is None, "52 seconds"
    assert Forecast.of(*_at(paced([70.0, 10.0, 12.0], Ahead()))) is None, "two steps beside the first"
    assert Forecast.of(*_at(paced([40.0, 10.0, 12.0, 11.0], Ahead()))) is not None


def test_the_interval_is_that_of_the_mean_step_over_all_that_is_left() -> None:
    found = Forecast.of(
        *_at(paced([40.0, 10.0, 12.0, 11.0], Ahead(evaluation_steps=30, answers_seconds=100)))
    )
    assert found is not None
    left = 96 + 30 / 3  # steps, and the evaluation in steps
    assert found.seconds == pytest.approx(left * 11 + 100)
    assert found.high - found.seconds == pytest.approx(4.303 * 3**-0.5 * left, rel=0.01)  # Student's t of 2


def test_the_cost_counts_what_is_spent_already() -> None:
    said = Forecast(7200.0, 5400.0, 9000.0).line(1800.0, 0.5, datetime(2026, 11, 28, 14, 0, tzinfo=UTC))
    assert "about 2 h 00 min more (1 h 30 min to 2 h 30 min)" in said and "until 28 Nov 16:00 UTC" in said
    assert said.endswith("costs 1.25 (1.00 to 1.50) at 0.5 an hour")
    assert "costs" not in Forecast(7200.0, 5400.0, 9000.0).line(1800.0, None)


def _at(paced: tuple[Pace, float]) -> tuple[Pace, int, float]:
    pace, now = paced
    return pace, 100, now
