"""parity.json of an export: how far it is from the trained model, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.records.record import Record


@dataclass(frozen=True)
class Tolerance(Record):
    """What an export may differ by, in nats. `why` says where the figures come from."""

    max_logprob_diff: float
    mean_logprob_diff: float
    equal_greedy_fraction: float
    why: str


@dataclass(frozen=True)
class Difference(Record):
    """Of next-token log-probs, in nats, over all positions of all answers; and the share of equal greedy tokens.

    `weighed_equal_fraction` is that share with each position weighed by the gap between its two best log-probs, so that
    near-ties, which rounding decides, count for little. It is the one that is held to the tolerance.
    """

    max_logprob_diff: float
    mean_logprob_diff: float
    equal_greedy_fraction: float
    weighed_equal_fraction: float


@dataclass(frozen=True)
class Quantisation(Difference):
    """Of 16-bit files and GGUF from the model as trained on NF4."""

    tolerance: Tolerance | None


@dataclass(frozen=True)
class Parity(Difference):
    """The difference from `against`. `training_effect` is the mean one between the trained model and its base."""

    against: str | None
    tolerance: Tolerance | None
    dtype: str | None
    training_effect: float | None
    num_prompts: int | None
    num_positions: int | None
    problems: list[str] | None
    passed: bool | None
    quantisation: Quantisation | None = None
