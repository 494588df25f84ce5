"""The table of measurements, most important first: a name, the question that it answers, its points, how one is made.

The same run is the answer to several questions. `BASELINES` are the main job as it is, on a random base: their memory
is held against the plan, their speed against the stock script, and what was disturbed against them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.card import figures, memory_points
from benchmarks.card.place import Place, Run
from benchmarks.card.variants import VARIANTS, Variant
from toolkit.memory import terms
from toolkit.records.record import read_object

BASELINES = {stage: Run(f"{stage} 1", stage) for stage in ("sft", "dpo")}
AGAIN = {stage: Run(f"{stage} 2", stage) for stage in ("sft", "dpo")}
LEFT_SHARE = 0.75  # of the peak that a run needs: half of its rows still fit
STOPPED_AFTER = 2  # steps
ROUNDS = (("stock", 1), ("toolkit", 2), ("stock", 2))
EMBEDDED = ("sft", "dpo", "compare")


@dataclass(frozen=True)
class Measurement:
    """`points` are names; `measure` makes one. `seconds` is how long one takes until one has told it."""

    name: str
    question: str
    seconds: float
    points: Callable[[Place], list[str]]
    measure: Callable[[Place, str], dict[str, Any]]


def embedded(place: Place, script: str) -> dict[str, Any]:
    return figures.embedded(place.embedded(script))


def baseline(place: Place, stage: str) -> dict[str, Any]:
    return place.run(BASELINES[stage])


def speed(place: Place, point: str) -> dict[str, Any]:
    """The first of the toolkit's rounds is the baseline; how far the second is from it, nobody having disturbed either,
    is what the card's own order of sums makes of equal commands."""
    who, stage, _ = point.split()
    if who == "stock":
        return place.stock(stage, point)
    place.run(BASELINES[stage])
    return place.run(AGAIN[stage]) | {"difference": _from_baseline(place, AGAIN[stage])}


def recovery(place: Place, stage: str) -> dict[str, Any]:
    """The baseline's settings with less memory than they need: somebody else holds the rest."""
    undisturbed = place.run(BASELINES[stage])
    peak = undisturbed["peak_gib"]
    leave = None if peak is None else LEFT_SHARE * peak + terms.CONTEXT_GIB
    run = Run(f"{stage} with too little memory", stage, leave_gib=leave)
    found = place.run(run)
    return {
        "left_gib": leave,
        "oom_events": found["oom_events"],
        "num_steps": len(found["losses"]),
        "difference": _from_baseline(place, run),
    }


def resume(place: Place, stage: str) -> dict[str, Any]:
    """SIGTERM in the middle, then the same command again."""
    place.run(BASELINES[stage])
    run = Run(f"{stage} stopped", stage)
    folder = place.output(run)
    if not figures.is_finished(folder):
        place.stop(run, lambda: len(figures.steps(folder)) >= STOPPED_AFTER)
    found = place.run(run, goes_on=True)
    return {
        "resumed_at_steps": read_object(folder / "manifest.json")["resumed_at_steps"],
        "num_steps": len(found["losses"]),
        "difference": _from_baseline(place, run),
    }


def memory(place: Place, name: str) -> dict[str, Any]:
    number = [memory_points.name(point) for point in place.size.points].index(name)
    point = place.size.points[number]
    plan, _ = memory_points.planned(place.size.recipe, point, place.size.point_steps, place.card)
    settings = memory_points.settings(place.size.recipe, point, place.size.point_steps)
    measured = place.ask(what="point", stage=point[0], settings=settings, steps=place.size.point_steps)
    return memory_points.described(point, number, plan, measured)


def variant(place: Place, name: str) -> dict[str, Any]:
    """One thing otherwise than in the baseline, whose settings are pinned."""
    found = next(variant for variant in VARIANTS if variant.name == name)
    made = place.run(Run(f"with {name}", found.stage, pinned(place, found), found.variables))
    return made | {"stage": found.stage, "against": found.against}


def pinned(place: Place, variant: Variant) -> tuple[str, ...]:
    """The variant's settings behind what the plan chose for the baseline: rows at once, or tokens, never both."""
    chosen = place.plan(variant.stage).settings.chosen()
    chosen.pop(
        "per_device_train_batch_size" if chosen["tokens_per_micro_batch"] else "tokens_per_micro_batch"
    )
    return (*(f"memory.{key}={json.dumps(value)}" for key, value in chosen.items()), *variant.settings)


def in_worker(place: Place, what: str) -> dict[str, Any]:
    return place.ask(what=what)


def _from_baseline(place: Place, run: Run) -> dict[str, float]:
    return figures.difference(place.output(run), place.output(BASELINES[run.stage]))


def _names(*names: str) -> Callable[[Place], list[str]]:
    return lambda place: list(names)


MEASUREMENTS = (
    Measurement(
        "embedded",
        "Do SFT, DPO and the comparison of the embedded recipe do the right thing on this device?",
        90,
        _names(*EMBEDDED),
        embedded,
    ),
    Measurement(
        "baseline",
        "Does the main job start and train here, and is its peak the planned one?",
        180,
        _names("sft", "dpo"),
        baseline,
    ),
    Measurement(
        "speed",
        "How fast is it beside a stock Unsloth script on the same rows, and at which peak?",
        180,
        _names(*(f"{who} {stage} {number}" for stage in ("sft", "dpo") for who, number in ROUNDS)),
        speed,
    ),
    Measurement(
        "recovery",
        "Does a run that runs out of memory for real end with the weights of one that did not?",
        150,
        _names("sft"),
        recovery,
    ),
    Measurement(
        "resume",
        "Does a run that was stopped by SIGTERM end with the weights of one that was not?",
        200,
        _names("sft", "dpo"),
        resume,
    ),
    Measurement(
        "memory",
        "How far is the planned peak from the measured one, and which constants would be right?",
        90,
        lambda place: [memory_points.name(point) for point in place.size.points],
        memory,
    ),
    Measurement(
        "variants",
        "What do shared prompts, compiling, the loss kernels and the allocator's settings cost or bring?",
        240,
        lambda place: [variant.name for variant in VARIANTS],
        variant,
    ),
    Measurement(
        "attention",
        "What does xFormers bring to dense batches beside PyTorch's own attention?",
        90,
        _names("attention"),
        in_worker,
    ),
    Measurement(
        "bf16",
        "Which bf16 rate does this card reach, and which share of it does training?",
        60,
        _names("bf16"),
        in_worker,
    ),
)
