"""The losses of DPO that a recipe may name, and what is known of each before anything is trained.

All are TRL's (dpo_trainer.py, `_compute_loss`). Those that couple the rows of a batch (aot, sft) are left out: in
pieces after an out-of-memory error they would be another loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

DpoLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "nca_pair",
    "discopop",
    "sigmoid_norm",
]


@dataclass(frozen=True)
class Loss:
    """One loss, by its value while policy and reference are the same.

    `start` is that value for a beta, `formula` says it in words. Most losses read beta times the log-ratios; those that
    are `squared` pull log-ratios to a distance of 1 / (2 beta). `per_token` ones take them a token of the reply. Only
    where the margin is `log_odds` does it say how probable the preference is.
    """

    formula: str
    start: Callable[[float], float]
    squared: bool = False
    per_token: bool = False
    log_odds: bool = False
    has_label_smoothing: bool = False

    def slope(self, beta: float) -> float:
        """How much the loss changes at most for each nat of a log-ratio near the start."""
        return 1 / beta if self.squared else beta


def _ln_2(beta: float) -> float:
    return math.log(2)


def _one(beta: float) -> float:
    return 1.0


LOSSES: dict[DpoLoss, Loss] = {
    "sigmoid": Loss("ln 2", _ln_2, log_odds=True),
    "robust": Loss("ln 2", _ln_2, log_odds=True, has_label_smoothing=True),
    "hinge": Loss("1", _one),
    "ipo": Loss("1 / (4 beta^2)", lambda beta: 1 / (4 * beta**2), squared=True, per_token=True),
    "apo_zero": Loss("1", _one),
    "apo_down": Loss("1", _one),
    "sppo_hard": Loss("1 / (2 beta^2)", lambda beta: 1 / (2 * beta**2), squared=True),
    "nca_pair": Loss("2 ln 2", lambda beta: 2 * math.log(2)),
    "discopop": Loss("(1 + ln 2) / 2", lambda beta: (1 + math.log(2)) / 2),
    "sigmoid_norm": Loss("ln 2", _ln_2, per_token=True, log_odds=True),
}
