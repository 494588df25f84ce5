"""Error bars: as wide as theory says, right as often as they claim, never certain of what cannot be known."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evaluation import intervals
from toolkit.evaluation.intervals import PerRow, difference, interval, mcnemar, student_quantile, swapped

SEED = 3407


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to see whether an interval covers, where hundreds are made."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 1000)


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = interval(PerRow.mean(values), SEED)
    standard_error = values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean()) and found.num_rows == 400
    assert found.low == pytest.approx(values.mean() - 1.966 * standard_error, abs=0.05 * standard_error)
    assert found.high == pytest.approx(values.mean() + 1.966 * standard_error, abs=0.05 * standard_error)


def test_a_loss_is_weighted_by_tokens_and_its_error_is_that_of_a_ratio() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(5, 80, 300).astype(float)
    losses = tokens * random.normal(1.5, 0.4, 300)
    found = interval(PerRow(losses, tokens), SEED)
    value = losses.sum() / tokens.sum()
    # linearised, e.g. Cochran (1977), chapter 6
    standard_error = np.std(losses - value * tokens, ddof=1) / math.sqrt(300) / tokens.mean()
    assert found.value == pytest.approx(value)
    assert (found.high - found.low) / 2 == pytest.approx(1.968 * standard_error, rel=0.04)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("num_rows", [2, 5, 30])
def test_an_interval_holds_the_truth_as_often_as_it_says(num_rows: int) -> None:
    random = np.random.default_rng(2)
    held = 0
    for seed in range(400):
        tokens = random.integers(5, 60, num_rows).astype(float)
        found = interval(PerRow(tokens * random.normal(2, 1, num_rows), tokens), seed)
        held += found.low <= 2 <= found.high
    assert 0.90 <= held / 400 <= 0.98


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("share", "num_rows"), [(0.5, 10), (0.8, 96), (0.98, 50), (0.999, 20)])
def test_so_does_that_of_a_share_near_its_end(share: float, num_rows: int) -> None:
    random = np.random.default_rng(3)
    found = [interval(PerRow.fraction(random.random(num_rows) < share), seed) for seed in range(300)]
    assert np.mean([one.low <= share <= one.high for one in found]) >= 0.93


def test_all_right_is_not_certainty() -> None:
    found = interval(PerRow.fraction(np.ones(96, bool)), SEED)
    assert found.value == found.high == 1 and 0.94 <= found.low <= 0.97  # the exact limit is 0.962
    same = difference(PerRow.fraction(np.ones(96, bool)), PerRow.fraction(np.ones(96, bool)), SEED)
    assert same.difference == 0 and same.p_value == 1 and same.low < -0.01 and same.high > 0.01


def test_one_row_has_no_error_bar_and_a_share_of_one_nearly_any() -> None:
    alone = interval(PerRow(np.array([3.0]), np.array([2.0])), SEED)
    assert alone.value == 1.5 and math.isnan(alone.low) and math.isnan(alone.high)
    share = interval(PerRow.fraction(np.array([True])), SEED)
    assert share.high - share.low >= 0.8


def test_a_nan_stays_one() -> None:
    rows = PerRow.mean(np.array([1.0, math.nan, 2.0]))
    assert all(math.isnan(number) for number in interval(rows, SEED)[:3])
    found = difference(rows, PerRow.mean(np.ones(3)), SEED)
    assert math.isnan(found.difference) and math.isnan(found.p_value)


@pytest.mark.usefixtures("few_resamples")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 2**31))
def test_a_share_lies_in_its_interval_and_both_between_0_and_1(flags: list[bool], seed: int) -> None:
    found = interval(PerRow.fraction(np.array(flags)), seed)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_same_rows_give_the_same_interval() -> None:
    rows = PerRow.mean(np.random.default_rng(4).normal(size=50))
    assert interval(rows, SEED) == interval(rows, SEED) != interval(rows, SEED + 1)


def test_mcnemar_is_the_sign_test_of_the_rows_that_differ() -> None:
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1
    assert 0 < mcnemar(60_000, 40_000) < 1e-300 or mcnemar(60_000, 40_000) == 0


def test_swapping_models_within_rows_counts_the_arrangements() -> None:
    assert swapped(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), SEED) == pytest.approx(2 / 2**5, abs=0.01)
    assert swapped(np.array([1.0, -1.0]), SEED) == 1
    assert swapped(np.zeros(4), SEED) == 1


@pytest.mark.usefixtures("few_resamples")
def test_a_paired_test_cries_wolf_once_in_twenty_times_and_sees_what_a_mean_of_each_would_not() -> None:
    random = np.random.default_rng(5)
    alarms = missed = 0
    for seed in range(300):
        hard = random.normal(0, 5, 40)  # how hard a row is for any model
        same = PerRow.mean(hard + random.normal(0, 0.5, 40)), PerRow.mean(hard + random.normal(0, 0.5, 40))
        alarms += difference(*same, seed).p_value < 0.05
        better = PerRow.mean(same[0].totals + 0.5)
        found = difference(better, same[1], seed)
        missed += not (found.low > 0 and found.p_value < 0.05)
    assert alarms / 300 <= 0.09
    assert missed / 300 <= 0.05


def test_a_difference_the_other_way_round_is_its_negative() -> None:
    random = np.random.default_rng(6)
    one, other = PerRow.mean(random.normal(1, 1, 30)), PerRow.mean(random.normal(0, 1, 30))
    there, back = difference(one, other, SEED), difference(other, one, SEED)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.05)
    assert there.p_value == back.p_value


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (10**6, 1.960)],
)
def test_students_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=1e-2)


def test_many_rows_take_no_more_memory_than_a_few_resamples_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 40)
    values = np.random.default_rng(7).normal(size=100_000)
    tracemalloc.start()
    interval(PerRow.mean(values), SEED)
    swapped(values, SEED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20  # 40 resamples at once would take 160 MiB
