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
class ScoreTolerance(Record):
    """What the scores of an exported reward model may differ by. `why` says where the figures come from."""

    max_score_diff: float
    mean_score_diff: float
    equal_order_fraction: float
    why: str


@dataclass(frozen=True)
class ScoreParity(Record):
    """Of the scores of conversations from `against`, in shares of their spread (standard deviation) under the trained
    model; and the share of their pairs that both put in the same order, weighed by how far apart they are."""

    max_score_diff: float
    mean_score_diff: float
    equal_order_fraction: float
    against: str | None
    tolerance: ScoreTolerance | None
    dtype: str | None
    num_conversations: int | None
    problems: list[str] | None
    passed: bool | None
    from_trained: float | None  # mean difference from the model as it was trained, where that is another one


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
