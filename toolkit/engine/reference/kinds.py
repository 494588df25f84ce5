"""What a stage measures against its reference: which log-probs of a row, and where its loss begins.

A trainer names its own as `reference_kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.recipe.dpo_losses import LOSSES


@dataclass(frozen=True)
class Start:
    """The loss of some rows while policy and reference are the same, in words too; `slope` is how much it changes at
    most for each nat of a log-ratio."""

    value: float
    formula: str
    slope: float


@dataclass(frozen=True)
class Kind:
    """Two log-probs of each row; rows are `called` so. `ids` are the columns that decide them, `columns` TRL's names
    for the reference's.

    `apart` makes of both log-ratios to the reference what has to be 0 at the start, `logged` finds the same, times
    beta, in a line of the log (None: it is no line of training). `start` is (trainer, rows) -> Start; KTO's depends
    on the labels of the rows, and so on their order, which is fixed.
    """

    name: str
    called: str
    ids: tuple[str, ...]
    columns: tuple[str, str]
    apart: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    logged: Callable[[Any, dict[str, float]], float | None]
    start: Callable[[Any, list[dict[str, Any]]], Start]


def _start_of_pairs(trainer: Any, rows: list[dict[str, Any]]) -> Start:
    known = LOSSES[trainer.loss_types[0]]
    return Start(known.start(trainer.beta), known.formula, known.slope(trainer.beta))


def _start_of_labelled(trainer: Any, rows: list[dict[str, Any]]) -> Start:
    """A weight times 1 - sigmoid(0) for each row."""
    weights = [trainer.desirable_weight if row["label"] else trainer.undesirable_weight for row in rows]
    return Start(
        sum(weights) / len(weights) / 2, "half the mean weight of the rows", trainer.beta * max(weights) / 4
    )


def _largest_reward(trainer: Any, logs: dict[str, float]) -> float | None:
    found = [logs[name] for name in ("rewards/chosen", "rewards/rejected") if name in logs]
    return max([*found, trainer.beta * logs["kl"]], key=abs) if found and "kl" in logs else None


PAIRS = Kind(
    name="DPO",
    called="pairs",
    ids=("prompt_ids", "chosen_ids", "rejected_ids"),
    columns=("ref_chosen_logps", "ref_rejected_logps"),
    apart=lambda chosen, rejected: chosen - rejected,
    logged=lambda trainer, logs: logs.get("rewards/margins"),
    start=_start_of_pairs,
)
LABELLED = Kind(
    name="KTO",
    called="rows",
    ids=("prompt_ids", "completion_ids", "KL_completion_ids"),
    columns=("ref_logps", "ref_KL_logps"),
    apart=lambda own, of_neighbour: torch.cat([own, of_neighbour]),
    logged=_largest_reward,
    start=_start_of_labelled,
)
