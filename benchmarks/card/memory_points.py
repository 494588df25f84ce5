"""The memory model against the card: which points are measured, what is planned for each, what fits them."""

from __future__ import annotations

from typing import Any

from benchmarks.card.place import STAND_IN
from toolkit.hardware import Card
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe

# (stage, packed, kept layers, rows, tokens a row, loss chunk in GiB). Neighbours differ in one thing alone, and every
# other point is held out of the fit: both halves hold all kinds.
Point = tuple[str, bool, int, int, int, float]
POINTS: tuple[Point, ...] = (
    *(
        ("sft", False, kept, rows, tokens, 0.5)
        for rows, tokens in ((2, 512), (2, 2048), (1, 4096))
        for kept in (0, 16, 32)
    ),
    *(("sft", True, kept, rows, 2048, 0.5) for rows in (1, 2) for kept in (0, 8, 16, 32)),
    *(("sft", True, 0, 2, 2048, chunk) for chunk in (0.125, 2.0)),
    *(
        ("dpo", False, kept, pairs, tokens, 0.5)
        for pairs, tokens in ((1, 1024), (2, 1024), (1, 2048))
        for kept in (0, 16)
    ),
)
# What is scaled together, and a constant beside them
SCALED = (("activations_kept",), ("layer_backward", "recomputed_inputs"), ("loss",))


def name(point: Point) -> str:
    stage, packed, kept, rows, tokens, chunk = point
    return f"{stage}{' packed' if packed else ''} {rows} x {tokens}, {kept} kept, logits {chunk:g}"


def settings(recipe: str, point: Point, steps: int) -> tuple[str, ...]:
    """What pins a point in the recipe."""
    stage, packed, kept, rows, tokens, chunk = point
    layers = load(recipe).model.architecture.num_hidden_layers
    alone = ("eval_steps=null", "eval_datasets=[]", "eval_rows=0", "logging_steps=1")
    return (
        "gpu=null",
        *(f"{other}.{value}" for other in ("sft", "dpo") for value in alone),
        f"sft.packing={str(packed).lower()}",
        f"memory.recompute_layers={layers - kept}",
        f"memory.per_device_train_batch_size={rows}",
        f"memory.loss_chunk_gib={chunk}",
        f"{stage}.effective_batch_size={rows}",
        f"{stage}.max_length={tokens}",
        f"{stage}.max_steps={steps}",
        "dpo.precompute_ref_batch_size=1",
        "dpo.share_prompts=false",  # tokens of a pair are then what the point says
    )


def planned(recipe: str, point: Point, steps: int, card: Card | None) -> tuple[Plan, Recipe]:
    """The plan of a point, on the stand-in where there is no card, and the recipe that pins it."""
    pinned = load(recipe, settings(recipe, point, steps))
    return plan_stage(pinned, point[0], card or STAND_IN, 64), pinned


def described(point: Point, number: int, plan: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    peak = measured["peak_gib"]
    return {
        "planned_gib": plan.peak_gib,
        "planned_items_gib": plan.items_gib,
        "error": None if peak is None else plan.peak_gib / peak - 1,
        "is_held_out": bool(number % 2),
        **measured,
    }


def fit(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Scales of three items and one constant, by least squares on half of the points; errors on the held-out ones.

    None where too little was measured; a point that ran out of memory and recovered is none. An error is
    planned / measured - 1: below 0 the plan promised too little.
    """
    import numpy as np

    measured = [point for point in points if point["peak_gib"] is not None and not point["events"]]
    training = [point for point in measured if not point["is_held_out"]]
    held_out = [point for point in measured if point["is_held_out"]]
    if len(training) <= len(SCALED) or not held_out:
        return None

    def features(point: dict[str, Any]) -> list[float]:
        items = point["planned_items_gib"]
        return [*(sum(items[name] for name in names) for names in SCALED), 1.0]

    def fixed(point: dict[str, Any]) -> float:
        return point["planned_gib"] - sum(features(point)[:-1])

    goal = [point["peak_gib"] - fixed(point) for point in training]
    scales, *_ = np.linalg.lstsq(
        np.array([features(point) for point in training]), np.array(goal), rcond=None
    )
    errors = [(fixed(p) + float(np.dot(features(p), scales))) / p["peak_gib"] - 1 for p in held_out]
    return {
        "num_fitted": len(training),
        "num_held_out": len(held_out),
        "scales": dict(zip(("+".join(names) for names in SCALED), scales.tolist(), strict=False)),
        "constant_gib": float(scales[-1]),
        "worst_error": max(errors, key=abs),
        "lowest_error": min(errors),
        "worst_error_of_the_plan_as_it_is": max((point["error"] for point in held_out), key=abs),
    }
