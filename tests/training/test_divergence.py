"""A loss out of its range is told by the log alone, of a continued run too."""

import math

import pytest

from toolkit.recipe.stage_sections import Divergence
from toolkit.training.divergence import good_until, strays

LIMITS = Divergence(factor=3.0, patience=3)


def history(*losses: float) -> list[dict[str, float]]:
    logs = [{"loss": loss, "step": 10 * number} for number, loss in enumerate(losses)]
    return [entry for log in logs for entry in (log, {"eval_loss": 99.0, "step": log["step"]})]


@pytest.mark.parametrize(
    ("losses", "num", "good"),
    [
        ((1.0, 0.5, 0.4), 0, None),
        ((1.0, 2.9, 3.0), 0, None),
        ((1.0, 0.5, 3.1), 1, 10),
        ((1.0, 4.0, 4.0, 1.0), 0, None),
        ((1.0, 0.5, 4.0, 5.0, math.nan), 3, 10),
        ((0.0, 4.0, 4.0), 0, None),
        ((-1.0, 4.0, 4.0), 0, None),
        ((), 0, None),
    ],
)
def test_what_is_out_of_range_and_since_when(losses: tuple[float, ...], num: int, good: int | None) -> None:
    logged = history(*losses)
    assert len(strays(logged, LIMITS)) == num and good_until(logged, LIMITS) == good
    assert strays(logged, None) == []
