"""What a run measured at each step: which curves a stage has, and few enough points to draw. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from toolkit.recipe import stages
from toolkit.recipe.rl_section import TRUNCATED
from toolkit.recipe.stages import FIRST_STEP_APART

NUM_POINTS = 2000  # of one curve: about two for each pixel of a wide screen
NUM_FOR_MEANS = 100  # from so many points on, a line of about so many means is drawn over them
SHORTEST_STRETCH = 5  # points under one mean
NUM_TABLED = 25  # values of a curve in the table behind its figure
PLANNED = "planned_peak_gib"  # the only series that was not logged
TIED = "rewards/accuracies"  # noise before FIRST_STEP_APART

Point = tuple[int, float | None]


class Style(NamedTuple):
    """How a value is written: by Python, by Bokeh (numbro, or printf after a %), and by Bokeh on the axis."""

    plain: str
    tip: str
    tick: str = "0.[000]a"


NUMBER, REWARD, NATS = Style("{:.4f}", "0.0000"), Style("{:.3f}", "0.000"), Style("{:.2f}", "0.00")
SHARE, COUNT = Style("{:.1%}", "0.0%", "0%"), Style("{:,.0f}", "0,0")
POWER = Style("{:.2e}", "%.2e", "%.1e")


@dataclass
class Series:
    """One name of metrics.jsonl: `values[i]` was logged at `steps[i]`, None where it was not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Curve:
    """`key` is the name in metrics.jsonl, `colour` a custom property of the page's style.

    `dash` and `marker` are Bokeh's; without a marker few points are no dots either.
    """

    label: str
    key: str
    colour: str
    dash: str = "solid"
    marker: str | None = "circle"


@dataclass(frozen=True)
class Chart:
    """One figure. `axis` is what its values are, with their unit, `style` how a value is written.

    A chart with `mean` gets a line of means over curves of many points.
    """

    title: str
    about: str
    axis: str
    curves: tuple[Curve, ...]
    style: Style = NUMBER
    mean: bool = True

    @property
    def is_share(self) -> bool:
        return self.style == SHARE


TRAIN, EVAL, SECOND = "--curve-1", "--curve-2", "--curve-3"


def _evaluated(label: str, key: str, colour: str = EVAL) -> Curve:
    return Curve(label, f"eval_{key}", colour, "dashed", "diamond")


def _both(key: str) -> tuple[Curve, ...]:
    return Curve("train", key, TRAIN), _evaluated("evaluation", key)


def _replies(key: str) -> tuple[Curve, ...]:
    return (
        Curve("chosen", f"{key}/chosen", TRAIN),
        Curve("rejected", f"{key}/rejected", SECOND),
        _evaluated("chosen, evaluation", f"{key}/chosen", TRAIN),
        _evaluated("rejected, evaluation", f"{key}/rejected", SECOND),
    )


def _labelled(key: str) -> tuple[Curve, ...]:
    return (
        Curve("desirable", f"{key}/chosen", TRAIN),
        Curve("undesirable", f"{key}/rejected", SECOND),
        _evaluated("desirable, evaluation", f"{key}/chosen", TRAIN),
        _evaluated("undesirable, evaluation", f"{key}/rejected", SECOND),
    )


def _only(label: str, key: str) -> tuple[Curve, ...]:
    return (Curve(label, key, TRAIN),)


CHARTS = {  # by the names that a stage's `charts` lists
    "loss": Chart("Loss", "lower is better", "nats a trained token", _both("loss")),
    "pair_loss": Chart(
        "Loss", "lower is better; ln 2 = 0.6931 where nothing is learnt yet", "nats a pair", _both("loss")
    ),
    "token_accuracy": Chart(
        "Token accuracy",
        "trained tokens that rank first",
        "share of tokens",
        _both("mean_token_accuracy"),
        SHARE,
    ),
    "reward_margin": Chart(
        "Reward margin", "chosen minus rejected", "nats times beta", _both("rewards/margins"), REWARD
    ),
    "reward_accuracy": Chart(
        "Reward accuracy",
        "pairs whose chosen reply has the larger reward; without step 1, where policy and reference are one and every "
        "pair is a tie",
        "share of pairs",
        _both("rewards/accuracies"),
        SHARE,
    ),
    "rewards": Chart(
        "Rewards", "beta times the log-ratio to the reference", "nats times beta", _replies("rewards"), REWARD
    ),
    "score_margin": Chart(
        "Margin", "score of chosen less that of rejected", "score", _both("margin"), REWARD
    ),
    "pair_accuracy": Chart(
        "Accuracy",
        "pairs whose chosen reply has the larger score",
        "share of pairs",
        _both("accuracy"),
        SHARE,
    ),
    "scores": Chart(
        "Scores",
        "smallest, mean and largest of a batch",
        "score",
        (
            Curve("largest", "max_reward", SECOND),
            Curve("mean", "mean_reward", TRAIN),
            Curve("smallest", "min_reward", EVAL),
        ),
        NATS,
    ),
    "reward": Chart(
        "Reward", "the weighted sum, in the mean over completions", "reward", _both("reward"), REWARD
    ),
    "kl_to_start": Chart(
        "KL to the policy it started from",
        "0 in the first step, or the run stops",
        "nats a token",
        _both("kl"),
        NUMBER,
    ),
    "entropy": Chart(
        "Entropy",
        "of the next token; near 0 nothing new is tried any more",
        "nats a token",
        _both("entropy"),
        REWARD,
    ),
    "completion_tokens": Chart(
        "Length of completions",
        "",
        "tokens",
        (
            Curve("longest", "completions/max_length", SECOND),
            Curve("mean", "completions/mean_length", TRAIN),
            _evaluated("mean, evaluation", "completions/mean_length"),
        ),
        NATS,
    ),
    "completions_ended": Chart(
        "Completions that ended",
        "the others were cut",
        "share of completions",
        _both("completions/ended_ratio"),
        SHARE,
    ),
    "correct": Chart(
        "Right completions",
        "sampled, and holding an answer that the row calls right",
        "share of completions",
        _both("correct"),
        SHARE,
    ),
    "labelled_loss": Chart(
        "Loss",
        "lower is better; half the mean weight of the rows where nothing is learnt yet",
        "value lost a row",
        _both("loss"),
    ),
    "labelled_margin": Chart(
        "Reward margin",
        "mean of the desirable replies less that of the undesirable ones",
        "nats times beta",
        _both("rewards/margins"),
        REWARD,
    ),
    "kl": Chart(
        "KL term",
        "mean log-ratio to the reference of prompts with the reply of another row, 0 at least: what rewards are "
        "measured from",
        "nats a reply",
        _both("kl"),
        NATS,
    ),
    "labelled_rewards": Chart(
        "Rewards",
        "beta times the log-ratio to the reference",
        "nats times beta",
        _labelled("rewards"),
        REWARD,
    ),
    "labelled_log_probs": Chart(
        "Log-probabilities", "of whole replies", "nats a reply", _labelled("logps"), NATS
    ),
    "log_probs": Chart("Log-probabilities", "of whole replies", "nats a reply", _replies("logps"), NATS),
}
OPTIMIZER = (
    Chart("Learning rate", "", "step size", _only("learning rate", "learning_rate"), POWER, mean=False),
    Chart("Gradient norm", "before clipping", "L2 norm", _only("gradient norm", "grad_norm"), REWARD),
    Chart(
        "Tokens per second",
        "of the time in training steps",
        "tokens a second",
        _only("tokens per second", "tokens_per_second"),
        COUNT,
    ),
)
MEMORY = Chart(
    "GPU memory",
    "as torch's allocator counts it",
    "GiB",
    (
        Curve("peak since the last log", "vram_peak_gib", TRAIN),
        Curve("allocated", "vram_gib", SECOND),
        Curve("reserved", "vram_reserved_gib", EVAL),
        Curve("planned peak", PLANNED, "--bad", "dotdash", None),
    ),
    NATS,
    mean=False,
)


def charts(stage: str, series: dict[str, Series]) -> list[Chart]:
    """The charts of a stage that have a value to show, with those of their curves that have."""
    shown = []
    own = (CHARTS[name] for name in stages.of(stage).charts)
    for chart in (*own, *_single_rewards(series), *OPTIMIZER, MEMORY):
        curves = tuple(curve for curve in chart.curves if _has_value(series.get(curve.key)))
        if curves:
            shown.append(replace(chart, curves=curves))
    return shown


def _single_rewards(series: dict[str, Series]) -> list[Chart]:
    """A figure for each reward that completions are given: its mean, and its spread among those to one prompt."""
    spreads = (name[len("rewards/") : -len("/spread")] for name in series if name.endswith("/spread"))
    names = [name for name in spreads if name != TRUNCATED]  # of which the share that ended says more
    return [
        Chart(
            f"Reward: {name}",
            "without spread among the completions to a prompt it teaches nothing",
            "reward",
            (
                Curve("mean", f"rewards/{name}/mean", TRAIN),
                Curve("spread", f"rewards/{name}/spread", SECOND),
                _evaluated("mean, evaluation", f"rewards/{name}/mean"),
            ),
            REWARD,
        )
        for name in names
    ]


def without_ties(series: dict[str, Series]) -> dict[str, Series]:
    """The series without what was logged while every pair was a tie."""
    tied = series.get(TIED)
    if tied is None or tied.steps[0] >= FIRST_STEP_APART:
        return series
    num = sum(step < FIRST_STEP_APART for step in tied.steps)
    return series | {TIED: Series(tied.steps[num:], tied.values[num:])}


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


def tabled(
    chart: Chart, series: dict[str, Series], limit: int = NUM_TABLED
) -> list[tuple[int, list[float | None]]]:
    """(step, the value of each curve or None) at a few of the steps, ends included: `limit` of each curve's own."""
    columns = [
        dict(zip(series[curve.key].steps, series[curve.key].values, strict=True)) for curve in chart.curves
    ]
    steps = sorted({step for column in columns for step in _spread(list(column), limit)})
    return [(step, [column.get(step) for column in columns]) for step in steps]


def _spread(steps: list[int], limit: int) -> list[int]:
    if len(steps) <= limit:
        return steps
    return [steps[place * (len(steps) - 1) // (limit - 1)] for place in range(limit)]


def described(chart: Chart, series: dict[str, Series]) -> str:
    """The figure in a sentence, for whoever does not see it."""
    said = []
    for curve in chart.curves:
        known = [
            (step, value)
            for step, value in zip(series[curve.key].steps, series[curve.key].values, strict=True)
            if value is not None
        ]
        (first, start), (last, end) = known[0], known[-1]
        write = chart.style.plain.format
        course = f"{write(end)} at step {last:,}"
        said.append(f"{curve.label} {f'from {write(start)} at step {first:,} to ' * (first != last)}{course}")
    return f"{chart.title}, {chart.axis}: {'; '.join(said)}"
