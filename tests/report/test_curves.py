"""Curves stay truthful when there are more points than a figure can show."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.report.curves import (
    NUM_POINTS,
    Point,
    Series,
    charts,
    means,
    num_in_mean,
    thinned,
    with_planned_peak,
)

values = st.one_of(st.none(), st.floats(-1e6, 1e6))
many = st.lists(values, max_size=400).map(lambda found: list(enumerate(found)))
limits = st.integers(5, 60)


def real(points: list[Point]) -> list[float]:
    return [value for _, value in points if value is not None]


@given(many, limits)
def test_thinning_keeps_extremes_ends_and_order(points: list[Point], limit: int) -> None:
    kept = thinned(points, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert set(kept) <= set(points)
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
    if real(points):
        assert (min(real(kept)), max(real(kept))) == (min(real(points)), max(real(points)))


@given(many, limits)
def test_few_points_are_all_kept(points: list[Point], limit: int) -> None:
    if len(points) <= limit:
        assert thinned(points, limit) == points


@given(many, limits)
def test_a_gap_stays_a_gap(points: list[Point], limit: int) -> None:
    if len(real(points)) < len(points):
        assert any(value is None for _, value in thinned(points, limit))


@pytest.mark.parametrize("place", [3, 4_321, 50_000, 99_998])
def test_one_spike_and_one_gap_among_100_000_survive(place: int) -> None:
    points: list[Point] = [(step, 1.0) for step in range(100_000)]
    points[place] = (place, 99.0)
    points[place // 2 + 1] = (place // 2 + 1, None)
    kept = thinned(points)
    assert (place, 99.0) in kept
    assert (place // 2 + 1, None) in kept
    assert len(kept) <= NUM_POINTS


@given(many, st.integers(1, 50))
def test_means_lie_within_their_points_and_weigh_them_equally(points: list[Point], stretch: int) -> None:
    mean = means(points, stretch)
    assert len(mean) == math.ceil(len(points) / stretch)
    for number, (step, value) in enumerate(mean):
        part = points[number * stretch : (number + 1) * stretch]
        assert part[0][0] <= step <= part[-1][0]
        expected = math.fsum(real(part)) / len(real(part)) if real(part) else None
        assert value == expected


def test_a_short_curve_has_no_means() -> None:
    assert num_in_mean(99) == 1
    assert num_in_mean(100) == 5
    assert num_in_mean(100_000) == 1000


def test_thinning_is_linear() -> None:
    def seconds(count: int) -> float:
        points: list[Point] = [(step, math.sin(step)) for step in range(count)]
        started = time.process_time()
        thinned(points)
        return time.process_time() - started

    seconds(1000)
    assert seconds(1_000_000) < 5


def test_a_chart_without_values_is_not_shown() -> None:
    series = {
        "loss": Series([1, 2], [2.0, 1.0]),
        "grad_norm": Series([1, 2], [None, None]),
        "vram_peak_gib": Series([1, 2], [3.0, 4.0]),
    }
    shown = charts("sft", with_planned_peak(series, 5.0))
    assert [chart.title for chart in shown] == ["Loss", "GPU memory"]
    assert [curve.label for curve in shown[1].curves] == ["peak since the last log", "planned peak"]
    assert [chart.title for chart in charts("sft", {})] == []
