"""report.json of a stage: what was planned, what came of it and what was measured, however the run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.records.evaluation_report import Measure
from toolkit.records.record import Record


@dataclass(frozen=True)
class Probe(Record):
    """The longest micro-batch of the epoch, run before the first step. `events` counts those out of memory."""

    rows: int | None
    tokens: int | None
    peak_gib: float | None
    planned_peak_gib: float | None
    split_factor: int | None
    recompute_layers: int | None
    events: int | None
    seconds: float | None


@dataclass(frozen=True)
class Answers(Record):
    """Whose answers answers.jsonl holds, before and after; `note` says why there are none."""

    before: str | None
    after: str | None
    note: str | None
    seconds: float | None


@dataclass(frozen=True)
class SourceScores(Record):
    """How a reward model scores pairs: the share whose chosen reply scores higher, and by how much."""

    accuracy: Measure | None
    margin: Measure | None


@dataclass(frozen=True)
class PairScores(SourceScores):
    """The same of all held-out pairs, and what of it goes with length; `note` says why there is nothing."""

    accuracy_chosen_shorter: Measure | None
    accuracy_chosen_longer: Measure | None
    length_correlation: Measure | None
    by_source: dict[str, SourceScores] | None
    note: str | None
    seconds: float | None


@dataclass(frozen=True)
class RunReport(Record):
    """None is what the run cannot know: an unfinished one its seconds, one without a GPU its measured peak.

    `settings` are those of the plan, `eval` the last evaluation by the Trainer's own names. `allocator` is what
    was set and what is in effect. `oom_events` are the lines of events.jsonl. `reference` is the reference pass of DPO
    or KTO: pairs (rows), how many of them were reused, seconds, the first step. `class_balance` is KTO's: rows of each
    class, and the weights that followed. `shared_prompts` is DPO's check of prompts that are run once, in
    nats, and how often attention was over them in the first step; or the reason why it is `off`. `scores` are
    those of a reward model, of held-out pairs, in place of `answers`. `reward_learning` is the KL of the first step,
    prompts, the course of each reward with its spread inside groups, and whether held-out completions were right.
    """

    stage: str | None
    outcome: str | None
    reason: str | None
    recipe: str | None
    device: str | None
    num_steps: int | None
    wall_seconds: float | None
    train_seconds: float | None
    train_tokens: int | None
    loss_first: float | None
    loss_last: float | None
    eval: dict[str, float | None] | None
    settings: dict[str, Any] | None
    planned_peak_gib: float | None
    planned_items_gib: dict[str, float] | None
    measured_peak_gib: float | None
    checkpoint_seconds: float | None
    allocator: dict[str, Any] | None
    probe: Probe | None
    oom_events: list[dict[str, Any]] | None
    reference: dict[str, Any] | None
    shared_prompts: dict[str, Any] | None
    reward_learning: dict[str, Any] | None
    class_balance: dict[str, Any] | None
    answers: Answers | None
    scores: PairScores | None
    notes: list[str] | None
