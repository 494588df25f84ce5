"""What scores of held-out pairs amount to, and how much of it is length."""

import numpy as np
import pytest

from toolkit.evaluation.pair_scores import Scored, summary
from toolkit.evaluation.table import score_lines


def scored(num: int = 200, by_length: bool = False) -> Scored:
    """Right in nine of ten; or only as far as the longer reply is the chosen one, which it is in seven of ten."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, (2, num)).astype(float)
    is_longer = random.random(num) < 0.7
    chosen = np.where(is_longer, lengths.max(axis=0) + 1, lengths.min(axis=0))
    rejected = np.where(is_longer, lengths.min(axis=0), lengths.max(axis=0) + 1)
    score = (chosen / 10, rejected / 10)
    if not by_length:
        margins = np.where(np.arange(num) % 10 == 0, -1.0, 2.0) + random.normal(0, 0.1, num)
        score = (1000 + margins, np.full(num, 1000.0))
    return Scored(score[0], score[1], chosen, rejected, ["fables"] * (num - 50) + ["letters"] * 50)


def test_a_model_that_reads_is_right_whichever_reply_is_the_longer() -> None:
    found = summary(scored(), seed=1)
    assert found.accuracy and found.accuracy.value == pytest.approx(0.9)
    assert found.accuracy.low is not None and found.accuracy.low < 0.9 < found.accuracy.high  # type: ignore[operator]
    assert found.margin and found.margin.value == pytest.approx(1.7, abs=0.05)
    shorter, longer, by_length = (
        found.accuracy_chosen_shorter,
        found.accuracy_chosen_longer,
        found.length_correlation,
    )
    assert shorter and longer and shorter.num_rows + longer.num_rows == 200  # type: ignore[operator]
    assert shorter.value == pytest.approx(0.9, abs=0.1) and longer.value == pytest.approx(0.9, abs=0.1)
    assert by_length and abs(by_length.value) < 0.2  # type: ignore[arg-type]
    assert found.by_source and found.by_source["letters"].accuracy.num_rows == 50  # type: ignore[union-attr]


def test_a_model_that_counts_words_is_right_where_chosen_is_longer_and_wrong_elsewhere() -> None:
    found = summary(scored(by_length=True), seed=1)
    assert found.accuracy_chosen_longer and found.accuracy_chosen_longer.value == 1
    assert found.accuracy_chosen_shorter and found.accuracy_chosen_shorter.value == 0
    assert found.length_correlation and found.length_correlation.value == pytest.approx(1)
    assert found.length_correlation.low == pytest.approx(
        1
    ) and found.length_correlation.high == pytest.approx(1)
    shown = "\n".join(score_lines(found))
    assert "accuracy where chosen is the shorter" in shown and "letters: " in shown


def test_one_length_correlates_with_nothing_and_one_pair_has_no_interval() -> None:
    flat = Scored(np.array([1.0, 2.0]), np.zeros(2), np.full(2, 7.0), np.full(2, 7.0), ["a", "a"])
    found = summary(flat, seed=1)
    assert found.accuracy_chosen_shorter is None and found.by_source == {}
    assert found.length_correlation and np.isnan(found.length_correlation.value)  # type: ignore[arg-type]
    assert score_lines(found)
