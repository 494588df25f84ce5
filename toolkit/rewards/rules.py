"""Rewards that a rule gives: of a text, its length and its end, and of the answers that its row calls right. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolkit.data.prompts import is_correct
from toolkit.data.turns import Messages
from toolkit.recipe.rl_section import ANSWER, RewardTerm, Rl


@dataclass(frozen=True)
class Completion:
    """What a model wrote to a prompt; `num_tokens` counts the end token, `ended` says that it came."""

    prompt: Messages
    text: str
    ids: tuple[int, ...]
    ended: bool
    answers: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def is_right(self) -> bool | None:
        """Whether one of the right answers occurs in it; None where none is known."""
        return is_correct(self.text, {"answers": list(self.answers)}) if self.answers else None


Rule = Callable[[Completion], float]


def rule(reward: RewardTerm, section: Rl) -> Rule | None:
    """What gives a reward; None for one that takes a user's function or a model."""
    if reward.ends:
        return lambda completion: float(completion.ended)
    if reward.contains:
        return lambda completion: float(bool(completion.is_right))
    if reward.length is not None:
        return _soft_limit(reward.length, section.max_completion_length)
    if reward.matches is not None:
        return _matches(reward.matches)
    if reward.json_keys is not None:
        return _json(reward.json_keys)
    return None


def _soft_limit(free: int, longest: int) -> Rule:
    return lambda completion: -max(0, completion.num_tokens - free) / (longest - free)


def _matches(pattern: str) -> Rule:
    if ANSWER not in pattern:
        fixed = re.compile(pattern)
        return lambda completion: float(bool(fixed.search(completion.text)))

    def holds(completion: Completion) -> float:
        filled = (pattern.replace(ANSWER, re.escape(answer)) for answer in completion.answers)
        return float(any(re.search(one, completion.text) for one in filled))

    return holds


def _json(keys: Sequence[str]) -> Rule:
    def parses(completion: Completion) -> float:
        try:
            value = json.loads(completion.text)
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or (isinstance(value, dict) and set(keys) <= value.keys()))

    return parses
