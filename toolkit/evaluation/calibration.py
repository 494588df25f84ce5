"""Is a reward margin worth what it claims? Confidence against how often the model is right. Pure.

Under Bradley and Terry, DPO's own assumption, a margin m says that the chosen reply is preferred with probability
sigmoid(m). Every pair's label is "chosen", so sigmoid(m) alone has only one outcome to be held against. Seen from the
model's side there are two: it prefers one of the replies with confidence sigmoid(|m|), and that is the chosen one or
not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.intervals import NUM_RESAMPLES, Floats, PerRow, resampled_sums, tails

NUM_BINS = 10  # Guo et al. (2017) take 15 for 10,000 rows and more; held-out pairs are fewer
ROWS_A_BIN = 8  # at least: of fewer rows an accuracy says nothing


def sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -values))


def per_row(margins: Floats) -> dict[str, PerRow]:
    """Measures that are means over pairs, of margins (pairs,).

    `preference_log_loss` is -log sigmoid(m), the loss of Rafailov et al. (2023), equation 7; `brier_score` is
    (1 - sigmoid(m))^2, Brier (1950); `overconfidence` is sigmoid(|m|) less 1 where right, 0 where wrong.
    """
    confidence, right = sigmoid(np.abs(margins)), margins > 0
    return {
        "preference_log_loss": PerRow.mean(np.logaddexp(0.0, -margins)),
        "brier_score": PerRow.mean((1 - sigmoid(margins)) ** 2),
        "overconfidence": PerRow.mean(confidence - right),
    }


def reliability(margins: Floats) -> list[dict[str, Any]]:
    """Bins of equally many pairs, from the least to the most confident."""
    confidence, right = sigmoid(np.abs(margins)), margins > 0
    return [
        {
            "confidence": float(confidence[rows].mean()),
            "accuracy": float(right[rows].mean()),
            "margin_low": float(np.abs(margins[rows]).min()),
            "margin_high": float(np.abs(margins[rows]).max()),
            "num_rows": len(rows),
        }
        for rows in _bins(margins)
    ]


def calibration_error(margins: Floats, seed: int) -> dict[str, float]:
    """Expected calibration error, Guo et al. (2017), equation 3: |accuracy - confidence|, averaged over pairs.

    Averages of absolute values only grow by chance: few pairs make a well calibrated model look off. So the interval
    is the basic bootstrap's, which takes that bias off again, and `calibrated_high` is what 95 % of perfectly
    calibrated models with these confidences would stay below on as many pairs.
    """
    confidence, right = sigmoid(np.abs(margins)), margins > 0
    bins = _bins(margins)
    member = np.zeros((len(margins), len(bins)))
    for column, rows in enumerate(bins):
        member[rows, column] = 1
    value = _error(right - confidence, member)
    sums = resampled_sums(member * (right - confidence)[:, None], seed)
    resamples = np.abs(sums).sum(axis=1) / len(margins)
    low, high = 2 * value - np.quantile(resamples, tails(0.95)[::-1])
    # Where the confidences are right, outcomes fall like this:
    random = np.random.default_rng(seed)
    by_chance = [
        _error((random.random(len(margins)) < confidence) - confidence, member)
        for _ in range(NUM_RESAMPLES // 10)
    ]
    return {
        "value": value,
        "low": float(np.clip(low, 0, value)),
        "high": float(np.clip(high, value, 1)),
        "num_rows": len(margins),
        "calibrated_high": float(np.quantile(by_chance, 0.95)),
    }


def _error(gaps: Floats, member: Floats) -> float:
    return float(np.abs(gaps @ member).sum() / len(gaps))


def _bins(margins: Floats) -> list[NDArray[np.intp]]:
    """Numbers of the pairs in each bin."""
    num_bins = max(1, min(NUM_BINS, len(margins) // ROWS_A_BIN))
    return np.array_split(np.argsort(np.abs(margins), kind="stable"), num_bins)
