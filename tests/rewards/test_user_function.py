"""A user's reward function: what is wrong with it is said before a model is loaded, and what it gives is looked at."""

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load
from toolkit.rewards.user_function import UserFunction


def function(folder: Path, text: str | None, name: str = "score") -> UserFunction:
    file = folder / "mine.py"
    if text is not None:
        file.write_text(text)
    return UserFunction.of(load("tiny"), f"{file}:{name}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("def score(", "is no Python"),
        ("def other():\n    pass\n", "has no score; its functions: other"),
    ],
)
def test_what_is_plainly_wrong_is_said_without_running_it(
    tmp_path: Path, text: str | None, said: str
) -> None:
    assert said in (function(tmp_path, text).problem("") or "")


def test_it_is_run_only_when_it_is_loaded(tmp_path: Path) -> None:
    found = function(tmp_path, "from math import sqrt as score\nimport nowhere_at_all\n")
    assert found.problem("") is None
    with pytest.raises(UserError, match="nowhere_at_all"):
        found.load()
    assert function(tmp_path, "score = len\n").load()([1, 2]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [(1.0, "returned float"), ([1.0], "1 values"), ([1.0, "x"], "'x'"), ([1.0, float("nan")], "nan")],
)
def test_a_list_of_finite_numbers_is_expected(tmp_path: Path, given: object, said: str) -> None:
    found = function(tmp_path, "score = len\n")
    assert found.checked([1, None], 2) == [1.0, None]
    with pytest.raises(UserError, match=said):
        found.checked(given, 2)
