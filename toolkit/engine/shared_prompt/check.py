"""Before the first step: pairs with their prompt shared against the same pairs padded, as TRL runs them.

The proof of the reference cannot see a wrong mask, for policy and reference would share it. Measured on the tiny model:
a rejected reply that sees the chosen one moves a pair by 2.9 nats in the median, positions that go on past the chosen
reply by 1.1; the right tree by 4e-6 in fp32, and in bf16 by as much as another padded batch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.errors import UserError

NUM_PAIRS = 16
MEDIANS = 4  # times the padded path's own noise that the median difference may reach,
WORST = 8  # and the largest one
# Nats of difference that count as none, in the median and at most: what another attention rounds in the sums of a few
# hundred log-probs. Pairs of one length have no padding, so no noise to go by: 16 of them on the tiny model in bf16
# came out 0.02 and 0.07 apart.
LEAST = {torch.float32: (1e-3, 1e-3)}
LEAST_HALF = (0.05, 0.25)

# rows, all in one padded batch or one alone, with shared prompts or not -> their log-probs (2 x rows,)
LogProbs = Callable[[list[Any], bool], torch.Tensor]


@dataclass(frozen=True)
class Check:
    """Differences of log-probs over both replies of `pairs` pairs, in nats: shared against padded, and as noise padded
    in one batch against padded one by one. Up to `least` and `least_worst` counts as none."""

    pairs: int
    median: float
    worst: float
    median_noise: float
    worst_noise: float
    least: float
    least_worst: float

    @property
    def holds(self) -> bool:
        return self.median <= max(self.least, MEDIANS * self.median_noise) and self.worst <= max(
            self.least_worst, WORST * self.worst_noise
        )


def choose(lengths: Sequence[tuple[int, int, int]]) -> list[int]:
    """Up to NUM_PAIRS rows: those of the longest prompts (of many turns, mostly), and all lengths from end to end."""
    by_prompt = sorted(range(len(lengths)), key=lambda row: lengths[row][0], reverse=True)
    chosen = by_prompt[: NUM_PAIRS // 4]
    others = sorted(set(range(len(lengths))) - set(chosen), key=lambda row: sum(lengths[row]))
    num = min(NUM_PAIRS - len(chosen), len(others))
    return chosen + [others[round(i * (len(others) - 1) / max(num - 1, 1))] for i in range(num)]


def compare(rows: list[Any], log_probs: LogProbs, dtype: torch.dtype) -> Check:
    """Three passes over the rows, without gradients."""
    padded, shared = log_probs(rows, False), log_probs(rows, True)
    alone = torch.stack([log_probs([row], False) for row in rows], dim=1).flatten()
    differences, noise = (shared - padded).abs(), (alone - padded).abs()
    least, least_worst = LEAST.get(dtype, LEAST_HALF)
    return Check(
        pairs=len(rows),
        median=differences.median().item(),
        worst=differences.max().item(),
        median_noise=noise.median().item(),
        worst_noise=noise.max().item(),
        least=least,
        least_worst=least_worst,
    )


def require(check: Check) -> None:
    """Raises UserError unless it holds."""
    if not check.holds:
        raise UserError(
            f"with shared prompts the log-probs of {check.pairs} pairs are not those of padded pairs: they differ by "
            f"{check.median:.3g} nats in the median and {check.worst:.3g} at most, where padding another way moves "
            f"them by {check.median_noise:.3g} and {check.worst_noise:.3g}. This is an error of ours or of the "
            "installed versions (report it with log.txt); --set dpo.share_prompts=false trains without it"
        )
