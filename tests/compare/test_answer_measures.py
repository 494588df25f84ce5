"""Length, repetition, script and a recipe's own measures of answers: known ones, and what holds for any words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.compare.answer_measures import (
    distinct,
    longest_repeated_span,
    matches,
    measures,
    script,
    script_drifts,
)

WORDS = st.lists(st.sampled_from("abc"), max_size=24)


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [("a b a b", 1, 2 / 4), ("a b a b", 2, 2 / 3), ("a b a b", 3, 1.0), ("a b", 3, None), ("", 1, None)],
)
def test_distinct_n_is_different_over_all(text: str, n: int, value: float | None) -> None:
    assert distinct(text.split(), n) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("a", 0), ("a b c", 0), ("a b c a b", 2), ("a b a b a", 3), ("no no no no", 3)],
)
def test_the_longest_repeat_may_overlap_itself(text: str, words: int) -> None:
    assert longest_repeated_span(text.split()) == words


@given(WORDS)
def test_the_longest_repeat_is_that_of_a_plain_search(words: list[str]) -> None:
    plain = [
        size
        for size in range(1, len(words))
        for start in range(len(words) - size)
        for other in range(start + 1, len(words) - size + 1)
        if words[start : start + size] == words[other : other + size]
    ]
    assert longest_repeated_span(words) == max(plain, default=0)


@given(WORDS, st.integers(1, 3))
def test_saying_it_twice_is_never_less_repetitive(words: list[str], n: int) -> None:
    once, twice = distinct(words, n), distinct(words * 2, n)
    assert once is None or (twice is not None and 0 < twice <= once + 1e-9)
    assert longest_repeated_span(words * 2) >= len(words) - (not words)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Hello, мир!", "LATIN"),
        ("Привет, world и все", "CYRILLIC"),
        ("東京タワーへ行きます", "HAN"),
        ("안녕하세요", "HANGUL"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{MATHEMATICAL BOLD SMALL B}", "LATIN"),
        ("42 + 1 = 43 😀", None),
    ],
)
def test_the_script_of_most_letters(text: str, name: str | None) -> None:
    assert script(text) == name


def test_drift_is_of_script_not_of_language() -> None:
    assert script_drifts("What is it?", "Это кот.") is True
    assert script_drifts("What is it?", "C'est un chat.") is False
    assert script_drifts("What is 6 x 7?", "42") is None


def test_measures_of_a_model() -> None:
    found = measures(["Q?", "Q?", "Q?"], ["a a", "", "да да да"], [3, 1, 8])
    assert found["mean_answer_tokens"] == 4 and found["median_answer_tokens"] == 3
    assert found["empty_fraction"] == pytest.approx(1 / 3)
    assert found["script_drift_fraction"] == 0.5  # the empty answer has no script
    assert found["max_longest_repeat_words"] == 2
    assert set(measures([], [], []).values()) == {None}


def test_an_expression_of_the_recipe_is_searched_for_in_every_answer() -> None:
    answers = ["Of course. It is a newt.", "A newt, of course.", "", "It is a newt.\nI hope that helps."]
    expressions = {"courteous": r"^Of course|helps\.$", "either_case": "(?i)of course", "newt": "newt"}
    assert matches(expressions, answers) == {"courteous": 0.5, "either_case": 0.5, "newt": 0.75}
    assert matches({}, answers) == {} and matches({"newt": "newt"}, []) == {"newt": None}


def test_an_expression_that_would_take_years_costs_its_own_measure_only() -> None:
    answers = ["a" * 60 + "b"]
    found = matches({"endless": "(a+)+$", "quick": "b$"}, answers, longest_seconds=0.2)
    assert found == {"endless": None, "quick": 1.0}
