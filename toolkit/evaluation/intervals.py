"""Error bars: bootstrap intervals of a measure over rows, and paired tests of two models on the same rows. Pure.

A row is the unit that is resampled, never a token: the tokens of one answer are not independent. Everything is
seeded, so the same numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
# Two seeds then move an end by about a hundredth of the interval's width; 2,000 rows take half a second.
NUM_RESAMPLES = 10_000
FEW_ROWS = 10
CHUNK = 2**20  # numbers drawn at one time: 8 MiB, however many rows there are

# Rows that a yes/no measure is given beside its own. 96 yeses out of 96 resample to nothing but 96 yeses, which
# would claim certainty. Two of each: Agresti & Coull (1998); for a difference one win and one loss: Bonett & Price
# (2012).
PSEUDO_ROWS, PSEUDO_WINS = 2, 1


class PerRow(NamedTuple):
    """A measure row by row: its value is sum(totals) / sum(counts), each of shape (rows,).

    `counts` are the tokens of each row, or ones for a plain mean. `is_fraction` says that totals are 0 or 1.
    """

    totals: Floats
    counts: Floats
    is_fraction: bool = False

    @classmethod
    def mean(cls, values: Floats) -> PerRow:
        return cls(np.asarray(values, np.float64), np.ones(len(values)))

    @classmethod
    def fraction(cls, flags: NDArray[np.bool_]) -> PerRow:
        return cls(np.asarray(flags, np.float64), np.ones(len(flags)), is_fraction=True)

    def where(self, chosen: NDArray[np.bool_]) -> PerRow:
        return PerRow(self.totals[chosen], self.counts[chosen], self.is_fraction)

    @property
    def is_yes_or_no(self) -> bool:
        return self.is_fraction and bool(np.isfinite(self.totals).all())

    @property
    def value(self) -> float:
        return float(self.totals.sum() / self.counts.sum())


class Interval(NamedTuple):
    """A measure and its 95 % interval; both ends are NaN where there is no telling (one row, or a NaN in the rows)."""

    value: float
    low: float
    high: float
    num_rows: int


class Difference(NamedTuple):
    """One model's measure minus another's on the same rows; `p_value` is two-sided."""

    difference: float
    low: float
    high: float
    p_value: float
    num_rows: int


class Resampled:
    """Measures over the same rows in the same order, resampled together: what differs is the model, not the draw."""

    def __init__(self, measures: Mapping[Hashable, PerRow], seed: int):
        self._measures, self._seed = measures, seed
        means = [key for key, rows in measures.items() if not rows.is_yes_or_no]
        columns = [column for key in means for column in (measures[key].totals, measures[key].counts)]
        sums = resampled_sums(np.stack(columns, axis=1), seed) if means else np.zeros((0, 0))
        self._values = {key: sums[:, 2 * place] / sums[:, 2 * place + 1] for place, key in enumerate(means)}

    def interval(self, key: Hashable) -> Interval:
        """The percentile bootstrap interval of a measure, widened for few rows; see `expanded`."""
        rows = self._measures[key]
        num_rows = len(rows.totals)
        if rows.is_yes_or_no:
            yes, pool = int(rows.totals.sum()) + PSEUDO_ROWS, num_rows + 2 * PSEUDO_ROWS
            # to resample the pool is to draw from a binomial
            drawn = np.random.default_rng(self._seed).binomial(pool, yes / pool, NUM_RESAMPLES)
            low, high = np.quantile(drawn / pool, tails(CONFIDENCE))
        else:
            low, high = expanded(self._values[key], rows.value, num_rows)
        return Interval(rows.value, float(low), float(high), num_rows)

    def difference(self, one: Hashable, other: Hashable) -> Difference:
        """`one` minus `other`. The interval resamples rows with both of their values.

        The p-value is McNemar's exact one for a yes/no measure, else that of swapping the two models within rows
        (Noreen 1989, approximate randomisation).
        """
        mine, theirs = self._measures[one], self._measures[other]
        num_rows, apart = len(mine.totals), mine.totals - theirs.totals
        if mine.is_yes_or_no and theirs.is_yes_or_no:
            wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
            pool = num_rows + 2 * PSEUDO_WINS
            shares = np.array([wins + PSEUDO_WINS, losses + PSEUDO_WINS, num_rows - wins - losses]) / pool
            drawn = np.random.default_rng(self._seed).multinomial(pool, shares, NUM_RESAMPLES)
            low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / pool, tails(CONFIDENCE))
            p_value = mcnemar(wins, losses)
        else:
            low, high = expanded(self._values[one] - self._values[other], mine.value - theirs.value, num_rows)
            p_value = swapped(apart, self._seed)
        return Difference(mine.value - theirs.value, float(low), float(high), p_value, num_rows)


def interval(rows: PerRow, seed: int) -> Interval:
    """`Resampled.interval` of one measure alone."""
    return Resampled({"": rows}, seed).interval("")


def difference(one: PerRow, other: PerRow, seed: int) -> Difference:
    """`Resampled.difference` of two models alone."""
    return Resampled({"one": one, "other": other}, seed).difference("one", "other")


def resampled_sums(columns: Floats, seed: int) -> Floats:
    """Column sums of NUM_RESAMPLES resamples of the rows of (rows, columns), drawn with replacement."""
    num_rows = len(columns)
    random, sums = np.random.default_rng(seed), np.empty((NUM_RESAMPLES, columns.shape[1]))
    for start, size in _chunks(num_rows):
        drawn = random.integers(num_rows, size=(size, num_rows))
        drawn += np.arange(size)[:, None] * num_rows
        times = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        with np.errstate(invalid="ignore"):  # a NaN in a row stays one
            sums[start : start + size] = times.astype(np.float64) @ columns
    return sums


def expanded(resamples: Floats, value: float, num_rows: int) -> tuple[float, float]:
    """The ends of the expanded percentile interval of Hesterberg (2015), The American Statistician 69.

    A percentile interval of n rows is too narrow by sqrt((n - 1) / n) and by the normal quantile in place of
    Student's; both are made good by taking percentiles further out. Resamples of FEW_ROWS have none far enough out:
    there it is the t interval with the bootstrap's standard error, symmetric and wide. (NaN, NaN) for a single row.
    """
    if num_rows < 2 or not np.isfinite(resamples).all():
        return math.nan, math.nan
    reach = student_quantile(num_rows - 1) * math.sqrt(num_rows / (num_rows - 1))
    if num_rows < FEW_ROWS:
        return value - reach * float(resamples.std()), value + reach * float(resamples.std())
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(resamples, (tail, 1 - tail))
    return float(low), float(high)


def tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def student_quantile(freedom: int) -> float:
    """Student's t that 97.5 % stay below: Abramowitz & Stegun 26.7.5, within 1 % from 3 degrees of freedom on."""
    within = CONFIDENCE
    if freedom == 1:
        return math.tan(math.pi * within / 2)
    if freedom == 2:
        return within * math.sqrt(2 / (1 - within**2))
    z = NormalDist().inv_cdf(tails(within)[1])
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of McNemar's test: of rows where two models differ, each wins half by chance."""
    num, fewer = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) - num * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def swapped(apart: Floats, seed: int) -> float:
    """The two-sided p-value of a sum of differences: how often it is as far from 0 with random signs.

    At least 1 / (NUM_RESAMPLES + 1); NaN where a difference is.
    """
    if not np.isfinite(apart).all():
        return math.nan
    random, observed, total = np.random.default_rng(seed + 1), abs(apart.sum()), apart.sum()
    slack = 1e-12 * np.abs(apart).sum()  # the same sum in another order of addition
    as_far = 0
    for _, size in _chunks(len(apart)):
        kept = random.integers(2, size=(size, len(apart)), dtype=np.int8).astype(np.float64) @ apart
        as_far += int((np.abs(2 * kept - total) >= observed - slack).sum())
    return (1 + as_far) / (1 + NUM_RESAMPLES)


def _chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    """(start, how many) of resamples that are drawn at one time."""
    size = max(1, CHUNK // num_rows)
    return ((start, min(size, NUM_RESAMPLES - start)) for start in range(0, NUM_RESAMPLES, size))
