"""The rest of a run: from its own steps, with the evaluations and answers that come."""

import math

import pytest

from toolkit.console.pace import FORWARD_SHARE, Ahead, Pace


def test_the_rest_is_estimated_from_the_steps_of_this_process() -> None:
    pace = Pace(480, now=0.0)  # continued at step 480
    assert pace.remaining_seconds(1500, now=30.0) is None
    pace.reached(481, now=60.0)  # compiles: all there is to go by
    assert pace.remaining_seconds(1500, now=60.0) == 1019 * 60
    pace.reached(482, now=62.0)
    pace.reached(483, now=64.0)
    assert pace.remaining_seconds(1500, now=64.0) == 1017 * 2
    assert pace.remaining_seconds(1500, now=65.0) == 1017 * 2 - 1  # counts down between steps
    pace.reached(1500, now=70.0)
    assert pace.remaining_seconds(1500, now=80.0) == 0


def test_evaluations_and_answers_count_first_as_expected_then_as_measured() -> None:
    pace = Pace(0, 0.0, Ahead(evaluation_steps=30, eval_steps=100, answers_seconds=20))
    for step in range(1, 51):
        pace.reached(step, float(step))
    assert pace.remaining_seconds(250, 50.0) == pytest.approx(200 + 3 * 30 * FORWARD_SHARE + 20)
    for step in range(51, 101):
        pace.reached(step, float(step))
    pace.evaluated(16.0)  # at step 100
    pace.paused(16.0)
    pace.reached(101, 117.0)
    assert pace.step_seconds == pytest.approx(1.0), "an evaluation is no step"
    assert pace.remaining_seconds(250, 117.0) == pytest.approx(149 + 2 * 16 + 20)


@pytest.mark.parametrize(
    ("eval_steps", "step", "expected"),
    [(None, 0, 1), (None, 249, 1), (100, 0, 3), (100, 200, 1), (125, 0, 2)],
)
def test_a_run_ends_with_an_evaluation(eval_steps: int | None, step: int, expected: int) -> None:
    assert Ahead(30, eval_steps).num_evaluations(step, 250) == expected
    assert Ahead(0, eval_steps).num_evaluations(step, 250) == 0


def test_how_sure_the_mean_of_a_step_is() -> None:
    pace = Pace(0, 0.0)
    for step, now in ((1, 50.0), (2, 51.0), (3, 54.0), (4, 55.0), (5, 58.0)):
        pace.reached(step, now)
    assert pace.num_counted == 4 and pace.step_seconds == 2.0
    assert pace.step_error == pytest.approx(math.sqrt(4 / 3) / 2)  # of 1, 3, 1, 3
