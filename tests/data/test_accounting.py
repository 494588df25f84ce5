import io
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolkit.data.accounting import Accounting
from toolkit.data.masking import IGNORE_INDEX, TokenizedChat, TokenizedLabelled, TokenizedPair
from toolkit.data.reasons import Reason
from toolkit.errors import UserError


def chat(prompt: int, answer: int, cut: bool = False) -> TokenizedChat:
    return TokenizedChat([1] * (prompt + answer), [IGNORE_INDEX] * prompt + [1] * answer, cut)


def pair(prompt: int, chosen: int, rejected: int, cut: bool = False) -> TokenizedPair:
    return TokenizedPair([1] * prompt, [1] * chosen, [1] * rejected, cut)


RESULTS = st.lists(
    st.one_of(
        st.builds(chat, st.integers(0, 9), st.integers(1, 9), st.booleans()),
        st.builds(pair, st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.booleans()),
        st.sampled_from(Reason),
    ),
    max_size=40,
)


def test_known_chats():
    results = [chat(3, 2), Reason.EMPTY_REPLY, chat(5, 5, cut=True), Reason.WRONG_TYPE, Reason.EMPTY_REPLY]
    assert Accounting.of(results).to_dict() == {
        "read": 5,
        "used": 2,
        "dropped": {"empty_reply": 2, "wrong_type": 1},
        "first_rows": {"empty_reply": [2, 5], "wrong_type": [4]},
        "cut": 1,
        "cut_fraction": 0.5,
        "tokens_per_epoch": 15,
        "trained_tokens_per_epoch": 7,
        "prompt_tokens_per_epoch": 8,
        "lengths": {
            "prompt": {"p50": 3, "p90": 5, "p99": 5, "max": 5},
            "answer": {"p50": 2, "p90": 5, "p99": 5, "max": 5},
            "total": {"p50": 5, "p90": 10, "p99": 10, "max": 10},
        },
    }


def test_known_pairs():
    report = Accounting.of([pair(10, 3, 7), pair(2, 1, 1)]).to_dict()
    assert report["tokens_per_epoch"] == 36  # both sequences of each pair
    assert report["trained_tokens_per_epoch"] == 12
    assert {kind: sizes["max"] for kind, sizes in report["lengths"].items()} == {
        "prompt": 10,
        "chosen": 3,
        "rejected": 7,
        "total": 17,
    }


def test_known_labelled_replies():
    report = Accounting.of(
        [
            TokenizedLabelled([1] * 10, [1] * 3, True, False),
            TokenizedLabelled([1] * 2, [1] * 7, False, False),
        ]
    ).to_dict()
    assert report["tokens_per_epoch"] == 22 and report["trained_tokens_per_epoch"] == 10
    assert [(kind, sizes["max"]) for kind, sizes in report["lengths"].items()] == [
        ("prompt", 10),
        ("desirable", 3),
        ("undesirable", 7),
        ("total", 13),
    ]


@given(results=RESULTS, at=st.integers(0, 40))
def test_used_and_dropped_are_all_and_parts_add_up(results, at):
    whole = Accounting.of(results)
    assert whole.used + whole.dropped.total() == whole.read == len(results)
    numbers = range(1, len(results) + 1)
    first, second = Accounting.of(results[:at], numbers[:at]), Accounting.of(results[at:], numbers[at:])
    for parts in ((first, second), (second, first)):
        total = sum(map(pickle.loads, map(pickle.dumps, parts)), Accounting())
        assert total.to_dict() | {"first_rows": {}} == whole.to_dict() | {"first_rows": {}}
        assert total.first_rows == whole.first_rows
    assert json.loads(json.dumps(whole.to_dict())) == whole.to_dict()
    Console(quiet=True).print(*whole.shown(1024))


def test_row_numbers_of_a_selection():
    report = Accounting.of([Reason.NO_ROOM] * 7, [70, 10, 20, 30, 60, 50, 40])
    assert (report + Accounting.of([Reason.NO_ROOM], [5])).first_rows == {Reason.NO_ROOM: [5, 10, 20, 30, 40]}


def test_a_lost_row_is_our_fault():
    with pytest.raises(AssertionError):
        Accounting(read=2, used=1)


def test_percentiles():
    report = Accounting.of([chat(0, size) for size in range(1, 101)])
    assert [report.percentile("total", percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert Accounting().percentile("total", 50) == 0


@pytest.mark.parametrize(
    ("longest", "max_length", "enough"),
    [
        (100, 1024, 128),
        (128, 1024, 128),
        (129, 1024, 192),
        (512, 1024, 512),
        (513, 1024, None),
        (30, 64, None),
    ],
)
def test_suggestion(longest, max_length, enough):
    text = Accounting.of([chat(1, longest - 1), chat(1, 1)]).suggestion(max_length)
    assert (text is None) == (enough is None)
    assert text is None or f"max_length {enough} " in text
    assert Accounting().suggestion(1024) is None


def test_too_many_dropped_stops_with_the_table():
    results = [chat(1, 1)] * 8 + [Reason.EMPTY_REPLY] * 7 + [Reason.NO_ROOM]
    report = Accounting.of(results)
    report.check(0.5)
    with pytest.raises(UserError) as error:
        report.check(0.10)
    assert str(error.value).split("\n") == [
        "8 of 16 rows (50.0%) are dropped, more than max_dropped_fraction 0.1 allows. "
        "Fix the rows or the recipe, or raise it.",
        "        7  empty_reply: a reply of the assistant is empty (rows 9, 10, 11, 12, 13, ...)",
        "        1  prompt_leaves_no_room: the prompt alone fills max_length (rows 16)",
    ]


def test_nothing_to_train_on_always_stops():
    with pytest.raises(UserError, match="No row of 2 can be trained on"):
        Accounting.of([Reason.EMPTY_REPLY] * 2).check(1.0)
    with pytest.raises(UserError, match="no rows"):
        Accounting().check(1.0)


def test_the_table_shows_reasons_cuts_and_the_suggestion():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*Accounting.of([chat(3, 2), chat(1, 1, cut=True), Reason.EMPTY_REPLY]).shown(1024))
    text = console.export_text()
    for words in (
        "2 of 3 rows used",
        "a reply of the assistant is empty",
        "1024: 50.0%",
        "7 tokens an epoch",
    ):
        assert words in text
    assert "max_length 64 holds them all" in " ".join(text.split())


def test_where_nothing_is_dropped_a_line_says_so():
    shown = Accounting.of([chat(3, 2), chat(1, 1)]).shown(1024)
    assert shown[0] == "2 of 2 rows used: nothing is dropped or cut" and len(shown) == 2


@given(RESULTS, st.booleans())
def test_the_state_survives_json(results, has_names):
    places = [("a.jsonl", i) if has_names else i for i in range(1, len(results) + 1)]
    report = Accounting.of(results, places)
    assert Accounting.from_state(json.loads(json.dumps(report.state()))) == report


def test_rows_of_several_sets_are_named():
    report = Accounting.of([Reason.NO_ROOM] * 3, [("b.jsonl", 2), ("a.jsonl", 10), ("a.jsonl", 9)])
    assert report.to_dict()["first_rows"] == {
        "prompt_leaves_no_room": ["a.jsonl:9", "a.jsonl:10", "b.jsonl:2"]
    }
    assert "(rows a.jsonl:9, a.jsonl:10, b.jsonl:2)" in report.reasons_as_text()[0]
