"""Whether a loss has left its range: held against that of the first step, as the Trainer's log has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.recipe.stage_sections import Divergence

History = Sequence[Mapping[str, Any]]


def first_loss(history: History) -> float | None:
    """Before anything was trained: the Trainer logs the first step by itself."""
    return next((entry["loss"] for entry in history if "loss" in entry), None)


def strays(history: History, limits: Divergence | None) -> list[Mapping[str, Any]]:
    """The logs at the end, in a row, whose loss is out of range; none of a loss that starts at 0 or below."""
    first = first_loss(history)
    if limits is None or first is None or not first > 0:
        return []
    found: list[Mapping[str, Any]] = []
    for entry in reversed([entry for entry in history if "loss" in entry]):
        if entry["loss"] <= limits.factor * first:
            break
        found.insert(0, entry)
    return found


def good_until(history: History, limits: Divergence | None) -> int | None:
    """The step of the last log in range; None where the last log is."""
    outside = strays(history, limits)
    steps = [entry["step"] for entry in history if "loss" in entry]
    return steps[-len(outside) - 1] if outside else None
