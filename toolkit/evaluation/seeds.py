"""Runs that differ in their seed: the interval of their mean, and whether two kinds differ by more than seeds do.

A seed is the unit here, as a row is in `intervals`: with three seeds nothing else is known of what a fourth would give.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from itertools import combinations
from statistics import fmean, stdev
from typing import NamedTuple

from toolkit.evaluation.intervals import student_quantile

SIGNIFICANT = 0.05

BySeed = Mapping[Hashable, float]


class Mean(NamedTuple):
    """Over `num` seeds, with its 95 % interval; the ends are NaN for a single one."""

    value: float
    low: float
    high: float
    num: int


class Apart(NamedTuple):
    """One kind less another, over the seeds that both have; `p_value` is two-sided, NaN where there is no telling."""

    difference: float
    low: float
    high: float
    p_value: float
    num: int


def mean(values: BySeed) -> Mean:
    """Student's interval."""
    found = list(values.values())
    middle, reach = fmean(found), _reach(found)
    return Mean(middle, middle - reach, middle + reach, len(found))


def apart(one: BySeed, other: BySeed) -> Apart | None:
    """Paired by seed: what a seed does to both, its order of rows say, falls out. None without a common one.

    Differences that are the same to the last bit tell nothing of their spread: shares of few rows are so.
    """
    pairs = [one[seed] - other[seed] for seed in one if seed in other]
    if not pairs:
        return None
    middle, reach, p_value = fmean(pairs), _reach(pairs), math.nan
    if len(pairs) > 1:
        error = stdev(pairs) / math.sqrt(len(pairs))
        if error:
            p_value = two_sided(abs(middle) / error, len(pairs) - 1)
        elif not middle:
            p_value = 1.0
        else:
            reach = math.nan
    return Apart(middle, middle - reach, middle + reach, p_value, len(pairs))


def differences(kinds: Mapping[str, BySeed]) -> dict[tuple[str, str], Apart]:
    """Each kind less each that stands before it, p-values by Holm's method: all of them hold at once."""
    found = {
        (later, earlier): difference
        for earlier, later in combinations(kinds, 2)
        if (difference := apart(kinds[later], kinds[earlier])) is not None
    }
    known = sorted(
        (key for key in found if not math.isnan(found[key].p_value)), key=lambda k: found[k].p_value
    )
    largest = 0.0
    for rank, key in enumerate(known):
        largest = max(largest, min(1.0, found[key].p_value * (len(known) - rank)))
        found[key] = found[key]._replace(p_value=largest)
    return found


def two_sided(t: float, freedom: int) -> float:
    """How often Student's t is as far from 0: the exact sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    within = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return max(0.0, 1 - within)


def _reach(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    return student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
