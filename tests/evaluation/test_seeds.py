"""Error bars over seeds: as wide as theory says, wrong as seldom as they claim."""

import math
import random

import pytest

from toolkit.evaluation.seeds import SIGNIFICANT, apart, differences, mean, two_sided


@pytest.mark.parametrize(  # textbook quantiles: 5 % lie beyond
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_the_p_value_of_a_t_is_the_textbook_one(freedom: int, t: float) -> None:
    assert two_sided(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert two_sided(0.0, freedom) == pytest.approx(1.0)


def test_one_seed_has_no_interval_and_tells_no_difference() -> None:
    assert math.isnan(mean({1: 0.5}).low)
    found = apart({1: 0.5}, {1: 0.7})
    assert found is not None and math.isnan(found.p_value)
    assert apart({1: 0.5}, {2: 0.7}) is None


def test_what_a_seed_does_to_both_falls_out() -> None:
    """Seeds move either by 10 and the two differ by 1: unpaired they could not be told apart."""
    one = {1: 10.0, 2: 20.1, 3: 29.9}
    found = apart({seed: value + 1 + seed / 100 for seed, value in one.items()}, one)
    assert found is not None and found.p_value < 0.001 and found.low > 0.9


def test_differences_without_any_spread_prove_nothing() -> None:
    """Shares of few rows: 0.95 and 1.0 in both seeds say nothing of the third."""
    found = apart({1: 1.0, 2: 1.0}, {1: 0.95, 2: 0.95})
    assert found is not None and math.isnan(found.p_value) and math.isnan(found.low)
    same = apart({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0})
    assert same is not None and same.p_value == 1.0


def test_of_sweeps_in_which_nothing_differs_at_most_one_in_twenty_claims_a_difference() -> None:
    dice = random.Random(3407)
    claims = 0
    for _ in range(1000):
        cells = {f"beta {n}": {seed: dice.gauss(0, 1) for seed in range(3)} for n in range(4)}
        claims += any(found.p_value < SIGNIFICANT for found in differences(cells).values())
    assert claims <= 65  # 50 and two standard errors
