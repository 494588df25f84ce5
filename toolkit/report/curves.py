"""What a run measured at each step: which curves a stage has, and few enough points to draw. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from toolkit.recipe import stages

NUM_POINTS = 2000  # of one curve: about two for each pixel of a wide screen
NUM_FOR_MEANS = 100  # from so many points on, a line of about so many means is drawn over them
SHORTEST_STRETCH = 5  # points under one mean
PLANNED = "planned_peak_gib"  # the only series that was not logged

Point = tuple[int, float | None]


@dataclass
class Series:
    """One name of metrics.jsonl: `values[i]` was logged at `steps[i]`, None where it was not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Curve:
    """`key` is the name in metrics.jsonl, `colour` a custom property of the page's style."""

    label: str
    key: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure. `style` is how the page writes a value: a format of Bokeh's (numbro), or of printf after a %.

    `tick` is the format of the axis. A chart with `mean` gets a line of means over curves of many points.
    """

    title: str
    about: str
    curves: tuple[Curve, ...]
    style: str
    tick: str = "0.[000]a"
    mean: bool = False


TRAIN, EVAL, SECOND = "--curve-1", "--curve-2", "--curve-3"


def _both(key: str) -> tuple[Curve, ...]:
    return Curve("train", key, TRAIN), Curve("evaluation", f"eval_{key}", EVAL)


def _replies(key: str) -> tuple[Curve, ...]:
    return (
        Curve("chosen", f"{key}/chosen", TRAIN),
        Curve("rejected", f"{key}/rejected", SECOND),
        Curve("chosen, evaluation", f"eval_{key}/chosen", TRAIN, dashed=True),
        Curve("rejected, evaluation", f"eval_{key}/rejected", SECOND, dashed=True),
    )


CHARTS = {  # by the names that a stage's `charts` lists
    "loss": Chart("Loss", "lower is better", _both("loss"), "0.0000", mean=True),
    "token_accuracy": Chart(
        "Token accuracy",
        "share of trained tokens that rank first",
        _both("mean_token_accuracy"),
        "0.0%",
        "0%",
        mean=True,
    ),
    "reward_margin": Chart(
        "Reward margin", "chosen minus rejected", _both("rewards/margins"), "0.000", mean=True
    ),
    "reward_accuracy": Chart(
        "Reward accuracy",
        "share of pairs whose chosen reply has the larger reward",
        _both("rewards/accuracies"),
        "0.0%",
        "0%",
        mean=True,
    ),
    "rewards": Chart(
        "Rewards", "beta times the log-ratio to the reference", _replies("rewards"), "0.000", mean=True
    ),
    "log_probs": Chart(
        "Log-probabilities", "of whole replies, in nats", _replies("logps"), "0.00", mean=True
    ),
    "score_margin": Chart(
        "Margin", "score of chosen minus that of rejected", _both("margin"), "0.000", mean=True
    ),
    "pair_accuracy": Chart(
        "Accuracy",
        "share of pairs whose chosen reply has the larger score",
        _both("accuracy"),
        "0.0%",
        "0%",
        mean=True,
    ),
    "scores": Chart(
        "Scores",
        "smallest, mean and largest of a batch",
        (
            Curve("largest", "max_reward", SECOND),
            Curve("mean", "mean_reward", TRAIN),
            Curve("smallest", "min_reward", EVAL),
        ),
        "0.00",
        mean=True,
    ),
}
OPTIMIZER = (
    Chart("Learning rate", "", (Curve("learning rate", "learning_rate", TRAIN),), "%.2e", "%.1e"),
    Chart(
        "Gradient norm", "before clipping", (Curve("gradient norm", "grad_norm", TRAIN),), "0.000", mean=True
    ),
    Chart(
        "Tokens per second", "", (Curve("tokens per second", "tokens_per_second", TRAIN),), "0,0", mean=True
    ),
)
MEMORY = Chart(
    "GPU memory",
    "GiB, as torch's allocator counts it",
    (
        Curve("peak since the last log", "vram_peak_gib", TRAIN),
        Curve("allocated", "vram_gib", SECOND),
        Curve("reserved", "vram_reserved_gib", EVAL),
        Curve("planned peak", PLANNED, "--bad", dashed=True),
    ),
    "0.00",
)


def charts(stage: str, series: dict[str, Series]) -> list[Chart]:
    """The charts of a stage that have a value to show, with those of their curves that have."""
    shown = []
    own = (CHARTS[name] for name in stages.of(stage).charts)
    for chart in (*own, *OPTIMIZER, MEMORY):
        curves = tuple(curve for curve in chart.curves if _has_value(series.get(curve.key)))
        if curves:
            shown.append(replace(chart, curves=curves))
    return shown


def with_planned_peak(series: dict[str, Series], peak_gib: float | None) -> dict[str, Series]:
    """The series, and the planned peak as a level beside the measured one where there is one to compare."""
    measured = series.get("vram_peak_gib")
    if peak_gib is None or not measured:
        return series
    return series | {PLANNED: Series([measured.steps[0], measured.steps[-1]], [peak_gib, peak_gib])}


def _has_value(series: Series | None) -> bool:
    return series is not None and any(value is not None for value in series.values)


def thinned(points: Sequence[Point], limit: int = NUM_POINTS) -> list[Point]:
    """At most `limit` of the points (5 or more), in their order; all of them when they are few.

    Each stretch of equally many points keeps its lowest and its highest, and its first gap (None) where it has
    any; the first and the last point stay. So no spike and no gap is smoothed away.
    """
    assert limit >= 5
    if len(points) <= limit:
        return list(points)
    inner = len(points) - 2
    stretch = -(-inner // ((limit - 2) // 3))
    kept = [points[0]]
    for start in range(1, inner + 1, stretch):
        part = points[start : min(start + stretch, inner + 1)]
        real = [(value, place) for place, (_, value) in enumerate(part) if value is not None]
        places = {min(real)[1], max(real)[1]} if real else set()
        if len(real) < len(part):
            places.add(next(place for place, (_, value) in enumerate(part) if value is None))
        kept.extend(part[place] for place in sorted(places))
    return [*kept, points[-1]]


def means(points: Sequence[Point], stretch: int) -> list[Point]:
    """The mean of each `stretch` points, at the step in their middle; None where all of them are gaps."""
    mean: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        real = [value for _, value in part if value is not None]
        mean.append((part[len(part) // 2][0], math.fsum(real) / len(real) if real else None))
    return mean


def num_in_mean(num_points: int) -> int:
    """How many points of a curve one mean is over; 1 for a curve that is drawn as it is."""
    return 1 if num_points < NUM_FOR_MEANS else max(SHORTEST_STRETCH, num_points // NUM_FOR_MEANS)
