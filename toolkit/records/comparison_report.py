"""compare/report.json: what was measured of the answers of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.records.record import Record


@dataclass(frozen=True)
class AnswerMeasures(Record):
    """Of one model's answers; docs/evaluation.md says what each is. `adapter` is None for the base.

    The rewards are measured where there is a reference to hold them against. `matches` is the share of answers that
    each of the recipe's own measures is found in, by name; None where its regular expression took too long.
    """

    adapter: str | None
    num_answers: int | None
    correct_fraction: float | None
    ended_fraction: float | None
    mean_answer_tokens: float | None
    median_answer_tokens: float | None
    mean_answer_characters: float | None
    median_answer_characters: float | None
    empty_fraction: float | None
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    mean_longest_repeat_words: float | None
    max_longest_repeat_words: int | None
    script_drift_fraction: float | None
    generate_seconds: float | None
    tokens_per_second: float | None
    mean_implicit_reward: float | None = None
    preference_accuracy: float | None = None
    matches: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Comparison(Record):
    """`reference` is the adapter, or "base", that rewards are held against; `compare` how the answers were made."""

    recipe: str | None
    device: str | None
    num_prompts: int | None
    num_questions: int | None
    reference: str | None
    compare: dict[str, Any] | None
    wall_seconds: float | None
    models: dict[str, AnswerMeasures] | None
