from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.selection import Condition, Selection, Step, key_of, mixed, parse_filter
from toolkit.errors import UserError

COLUMNS = {
    "score": [5, 3.5, None, 4.0, float("nan"), 9],
    "status": ["win", "tie", "win", "win", None, "tie"],
    "in_test": [False, True, False, False, True, False],
    "written": ["5", "3.5", "", "4", "1e3", "-1"],
    "turns": [[1], [2], [3], [4], [5], [6]],
}


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("score >= 4.0", [0, 3, 5]),
        ("score>=4", [0, 3, 5]),
        ("score < 4", [1]),
        ("score != 5", [1, 3, 5]),
        ("score == null", [2, 4]),
        ("score != null", [0, 1, 3, 5]),
        ('status != "tie"', [0, 2, 3]),
        ("status == 'win' and score > 4", [0]),
        ("in_test == false", [0, 2, 3, 5]),
        ("in_test == true and score == null", [4]),
        ("written > 3", [0, 1, 3, 4]),
        ('status == "and"', []),
    ],
)
def test_filters(expression, rows):
    assert list(Selection.of(6).where(expression, COLUMNS).rows) == rows


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "not understood"),
        ("score", "not understood at 'score'"),
        ("score = 4", "not understood"),
        ("score >= 4 or score < 1", "not understood"),
        ("score >= 4 and", "not understood at 'its end'"),
        ("score >= four", "four is not a number"),
        ("score >= null", "null can only be compared"),
        ("__import__('os').system('x') == 1", "not understood"),
        ("rating >= 4", "names no column of the set. Its columns: in_test, score"),
        ("turns >= 4", "cannot compare the turns of row 1, [1]"),
        ("status >= 4", "cannot compare the status of row 1, 'win'"),
        ("in_test >= 1", "cannot compare the in_test of row 1, False"),
        ("score == 'x'", "cannot compare the score of row 1, 5"),
    ],
)
def test_filters_that_cannot_be_used(expression, words):
    with pytest.raises(UserError) as error:
        Selection.of(6).where(expression, COLUMNS)
    assert words in str(error.value)


def test_parsed_filter():
    assert parse_filter(" a.b >= -4.5e1 and c-d!='x y' ") == [
        Condition("a.b", ">=", -45.0),
        Condition("c-d", "!=", "x y"),
    ]


def test_top():
    assert Selection.of(6).top(2, "score", COLUMNS).rows == (0, 5)  # in file order
    assert Selection.of(6).top(9, "score", COLUMNS).rows == (0, 1, 3, 5)  # null and NaN never
    assert Selection.of(4).top(2, "x", {"x": [1, 1, 1, 1]}).rows == (0, 1)  # of equal ones the earlier
    with pytest.raises(UserError, match="row 1 is 'win'"):
        Selection.of(6).top(2, "status", COLUMNS)
    with pytest.raises(UserError, match="names no column"):
        Selection.of(6).top(2, "delta", COLUMNS)


def test_every_step_is_recorded():
    chosen = Selection.of(6).where("score != null", COLUMNS).top(3, "score", COLUMNS)
    chosen = chosen.distinct("aaaaab").first(5).shuffled(7)
    assert sorted(chosen.rows) == [0, 5]
    assert chosen.steps == (
        Step("filter score != null", 6, 4),
        Step("top 3 by score", 4, 3),
        Step("deduplicate", 3, 2),
        Step("first 5", 2, 2),
        Step("shuffle with seed 7", 2, 2),
    )


def test_shuffle_is_the_same_everywhere():
    assert Selection.of(8).shuffled(3407).rows == (7, 4, 6, 5, 2, 1, 3, 0)
    assert Selection.of(8).shuffled(3407).rows != Selection.of(8).shuffled(3408).rows


@given(
    prompts=st.lists(st.integers(0, 20), min_size=2, max_size=60),
    num=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_no_prompt_on_both_sides(prompts, num, seed):
    chosen = Selection.of(len(prompts)).shuffled(seed)
    try:
        train, held = chosen.hold_out(num, prompts, seed)
    except UserError:
        assert num >= len(prompts) or num < min(map(prompts.count, prompts))
        return
    assert sorted(train.rows + held.rows) == list(range(len(prompts)))
    assert {prompts[row] for row in train.rows}.isdisjoint(prompts[row] for row in held.rows)
    assert 0 < len(held.rows) <= num
    assert train.rows
    assert [row for row in chosen.rows if row in set(held.rows)] == list(held.rows)
    if len(set(prompts)) == len(prompts):
        assert len(held.rows) == num
    assert chosen.hold_out(num, prompts, seed) == (train, held)


def test_hold_out_needs_rows_on_both_sides():
    with pytest.raises(UserError, match="Cannot hold out 2 of 3 rows with 1 distinct prompts"):
        Selection.of(3).hold_out(2, "aaa", 0)
    with pytest.raises(UserError, match="Cannot hold out 3 of 3"):
        Selection.of(3).hold_out(3, "abc", 0)


def test_leaks_are_removed_and_counted():
    clean = Selection.of(4).without("abca", seen={"a"})
    assert clean.rows == (1, 2)
    assert clean.steps[-1] == Step("not in training", 4, 2)


def test_keys():
    assert key_of({"a": 1, "b": ["é"]}) == key_of({"b": ["é"], "a": 1})
    assert key_of([{"a": "1"}]) != key_of([{"a": 1}])
    assert key_of("\ud83d") != key_of("\ud83e")
    assert len(key_of(None)) == 16


def test_sets_are_mixed_evenly():
    assert mixed([4, 2]) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    assert mixed([3]) == [(0, 0), (0, 1), (0, 2)]
    assert mixed([5, 0]) == [(0, i) for i in range(5)]
    assert Counter(which for which, _ in mixed([40, 30], [3, 1])) == {0: 40, 1: 13}


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
)
def test_a_mix_by_weight_takes_each_row_once_and_keeps_the_shares(sizes, weights):
    weights = weights[: len(sizes)]
    order = mixed(sizes, weights)
    assert len(set(order)) == len(order)
    taken = [sum(which == i for which, _ in order) for i in range(len(sizes))]
    most = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    for which, (size, weight, count) in enumerate(zip(sizes, weights, taken, strict=True)):
        assert count <= size and abs(count - most * weight) <= 1
        assert [row for i, row in order if i == which] == list(range(count))
    assert any(count == size for size, count in zip(sizes, taken, strict=True))


def test_integers_are_compared_exactly_and_however_long() -> None:
    columns = {
        "id": [9007199254740992, 9007199254740993, "9007199254740993", int("9" * 400), 9007199254740993.0]
    }
    everything = Selection.of(5)
    assert everything.where("id == 9007199254740993", columns).rows == (1, 2)
    assert everything.where(f"id == {'9' * 400}", columns).rows == (3,)
    assert everything.where("id > 1e300", columns).rows == (3,)
    assert everything.top(1, "id", columns).rows == (3,)
