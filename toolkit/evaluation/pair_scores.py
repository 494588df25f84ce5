"""Scores of held-out pairs -> how well a reward model tells them apart, and how much of it is length. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation.intervals import Floats, PerRow, Resampled, expanded, resampled_sums
from toolkit.evaluation.measures import of_each
from toolkit.records.evaluation_report import Measure
from toolkit.records.run_report import PairScores, SourceScores


@dataclass(frozen=True)
class Scored:
    """Pair by pair: both scores, the tokens of both replies, where it is from; arrays of shape (pairs,)."""

    chosen: Floats
    rejected: Floats
    chosen_tokens: Floats
    rejected_tokens: Floats
    sources: list[str]


def summary(scored: Scored, seed: int) -> PairScores:
    """Accuracy and margin with intervals, of all pairs and by source, and what of it goes with length."""
    margins, everything = scored.chosen - scored.rejected, np.ones(len(scored.chosen), bool)
    shorter = scored.chosen_tokens < scored.rejected_tokens
    longer = scored.chosen_tokens > scored.rejected_tokens
    return replace(
        PairScores.unknown(),
        **vars(_of(margins, everything, seed)),
        accuracy_chosen_shorter=_accuracy(margins, shorter, seed),
        accuracy_chosen_longer=_accuracy(margins, longer, seed),
        length_correlation=_correlation(scored, seed),
        by_source={name: _of(margins, rows, seed) for name, rows in of_each(scored.sources).items()},
    )


def _of(margins: Floats, rows: NDArray[np.bool_], seed: int) -> SourceScores:
    return SourceScores(
        _accuracy(margins, rows, seed),
        Measure(*Resampled({"": PerRow.mean(margins[rows])}, seed).interval("")),
    )


def _accuracy(margins: Floats, rows: NDArray[np.bool_], seed: int) -> Measure | None:
    """Share of these pairs whose chosen reply has the larger score; None where there are none."""
    if not rows.any():
        return None
    return Measure(*Resampled({"": PerRow.fraction(margins[rows] > 0)}, seed).interval(""))


def _correlation(scored: Scored, seed: int) -> Measure:
    """Pearson's, of score and tokens over all replies; the interval resamples pairs, whose replies share a prompt."""
    both = [(scored.chosen, scored.chosen_tokens), (scored.rejected, scored.rejected_tokens)]
    # shifted, else the squares of long replies leave no digits for the rest
    shift = [float(np.mean([side[which] for side in both])) for which in (0, 1)]
    shifted = [(score - shift[0], tokens - shift[1]) for score, tokens in both]
    moments = sum(
        np.stack([score, tokens, score**2, tokens**2, score * tokens, np.ones(len(score))], axis=1)
        for score, tokens in shifted
    )
    assert isinstance(moments, np.ndarray)
    value = float(_pearson(moments.sum(axis=0, keepdims=True))[0])
    low, high = expanded(_pearson(resampled_sums(moments, seed)), value, len(moments))
    return Measure(value, low, high, len(moments))


def _pearson(sums: Floats) -> Floats:
    x, y, xx, yy, xy, count = sums.T
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # scores or lengths that are all alike correlate with nothing
        found: Floats = (count * xy - x * y) / np.sqrt((count * xx - x**2) * (count * yy - y**2))
    return found
