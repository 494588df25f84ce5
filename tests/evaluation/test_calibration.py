"""Calibration of reward margins: known answers, and models whose margins mean what they say or not."""

import math

import numpy as np
import pytest

from toolkit.evaluation.calibration import calibration_error, per_row, reliability, sigmoid

SEED = 3407


def test_scores_of_a_few_pairs_by_hand() -> None:
    margins = np.array([0.0, 2.0, -1.0])
    scores = {name: rows.value for name, rows in per_row(margins).items()}
    chosen = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert scores["preference_log_loss"] == pytest.approx(sum(-math.log(p) for p in chosen) / 3)
    assert scores["brier_score"] == pytest.approx(sum((1 - p) ** 2 for p in chosen) / 3)
    confidence = (0.5 + chosen[1] + (1 - chosen[2])) / 3
    assert scores["overconfidence"] == pytest.approx(confidence - 1 / 3)


def test_margins_of_any_size_are_finite() -> None:
    scores = per_row(np.array([-1e6, 1e6]))
    assert scores["preference_log_loss"].value == pytest.approx(5e5)
    assert scores["brier_score"].value == 0.5 and sigmoid(np.array([-1e6]))[0] == 0


def pairs(num: int, scale: float) -> np.ndarray:
    """Margins of a model whose preference is right with the probability that its unscaled margin says."""
    random = np.random.default_rng(SEED)
    size = np.abs(random.normal(0, 1.5, num))
    right = random.random(num) < sigmoid(size)
    return scale * np.where(right, size, -size)


def test_margins_that_mean_what_they_say_are_told_from_those_that_promise_too_much_or_too_little() -> None:
    fair = calibration_error(pairs(2000, 1.0), SEED)
    assert fair["value"] <= fair["calibrated_high"] and fair["low"] <= 0.01
    for scale, sign in ((4.0, 1), (0.2, -1)):
        margins = pairs(2000, scale)
        off = calibration_error(margins, SEED)
        assert off["low"] > fair["calibrated_high"]
        assert sign * per_row(margins)["overconfidence"].value > 0.05


def test_the_bins_are_the_pairs_and_the_error_is_their_mean_gap() -> None:
    margins = pairs(200, 2.0)
    bins = reliability(margins)
    assert sum(one["num_rows"] for one in bins) == 200 and len(bins) == 10
    assert [one["confidence"] for one in bins] == sorted(one["confidence"] for one in bins)
    gap = sum(one["num_rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / 200
    assert calibration_error(margins, SEED)["value"] == pytest.approx(gap)


@pytest.mark.parametrize("num", [1, 3, 17])
def test_few_pairs_share_few_bins(num: int) -> None:
    margins = pairs(num, 1.0)
    found = calibration_error(margins, SEED)
    assert len(reliability(margins)) == max(1, num // 8)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
