"""Curves stay truthful when there are more points than a figure can show."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.report.curves import (
    CHARTS,
    NUM_POINTS,
    NUM_TABLED,
    Point,
    Series,
    charts,
    described,
    means,
    num_in_mean,
    tabled,
    thinned,
    with_planned_peak,
    without_ties,
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


@pytest.mark.parametrize("name", CHARTS)
def test_an_evaluation_is_told_from_training_without_its_colour(name: str) -> None:
    looks = [(curve.key.startswith("eval_"), curve.dash, curve.marker) for curve in CHARTS[name].curves]
    assert {look[1:] for look in looks if look[0]}.isdisjoint(look[1:] for look in looks if not look[0])


def test_the_first_step_of_dpo_says_nothing_of_accuracy() -> None:
    series = {"rewards/accuracies": Series([1, 10], [0.125, 0.6]), "loss": Series([1, 10], [0.69, 0.68])}
    shown = without_ties(series)
    assert shown["rewards/accuracies"].steps == [10] and shown["loss"].steps == [1, 10]
    assert without_ties(shown) == shown
    only = without_ties({"rewards/accuracies": Series([1], [0.125])})
    assert charts("dpo", only) == []


def test_behind_a_figure_stand_its_values_and_a_sentence() -> None:
    steps = list(range(1, 1001))
    series = {"loss": Series(steps, [2.0] * 999 + [1.0]), "eval_loss": Series([500, 1000], [1.5, None])}
    [chart] = charts("sft", series)
    rows = tabled(chart, series)
    assert rows[0] == (1, [2.0, None]) and rows[-1] == (1000, [1.0, None]) and (500, [2.0, 1.5]) in rows
    assert len(rows) <= 2 * NUM_TABLED
    assert described(chart, series) == (
        "Loss, nats a trained token: train from 2.0000 at step 1 to 1.0000 at step 1,000; "
        "evaluation 1.5000 at step 500"
    )
