"""What each rule gives to a completion."""

from typing import Any

import pytest

from toolkit.recipe.load import load
from toolkit.recipe.rl_section import RewardTerm
from toolkit.recipe.schema import Rl
from toolkit.rewards.rules import Completion, rule


def worth(
    reward: dict[str, Any], text: str, num_tokens: int = 5, ended: bool = True, answers: Any = ("custard",)
) -> float:
    section = load("tiny", ("rl.max_completion_length=40",)).rl
    assert isinstance(section, Rl)
    of_one = rule(RewardTerm.model_validate(reward), section)
    assert of_one is not None
    return of_one(
        Completion([{"role": "user", "content": "?"}], text, tuple(range(num_tokens)), ended, tuple(answers))
    )


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        ({"contains": True}, "It is Custard.", 1.0),
        ({"contains": True}, "It is custards.", 0.0),
        ({"matches": r"^#### {answer}$"}, "#### custard", 1.0),
        ({"matches": r"^#### {answer}$"}, "#### c.stard", 0.0),
        ({"matches": r"^\w+ed\b"}, "Asked and answered", 1.0),
        ({"json": []}, " [1, 2] ", 1.0),
        ({"json": ["name"]}, '{"name": 1, "age": 2}', 1.0),
        ({"json": ["name"]}, '["name"]', 0.0),
        ({"json": []}, "{", 0.0),
    ],
)
def test_of_its_text(reward: dict[str, Any], text: str, expected: float) -> None:
    assert worth(reward, text) == expected


def test_an_answer_with_signs_of_a_pattern_is_taken_as_it_is() -> None:
    assert worth({"matches": "{answer}"}, "about 3x5", answers=["3.5"]) == 0.0
    assert worth({"matches": "{answer}"}, "about 3.5", answers=["7", "3.5"]) == 1.0


def test_of_its_length_and_its_end() -> None:
    lengths = [worth({"length": 20}, "", num_tokens) for num_tokens in (5, 20, 30, 40)]
    assert lengths == [0.0, 0.0, -0.5, -1.0]
    assert [worth({"ends": True}, "", ended=ended) for ended in (True, False)] == [1.0, 0.0]
