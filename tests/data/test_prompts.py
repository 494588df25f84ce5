"""Prompts from a recipe or a file, and what counts as a correct answer."""

import io
import json
from pathlib import Path

import pytest

from toolkit.data.prompts import is_correct, read_prompts, read_questions
from toolkit.data.turns import Messages
from toolkit.errors import UserError
from toolkit.recipe.load import load


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("She lives in Marrowby.", True),
        ("marrowby", True),
        ("Marrowbyshire", False),
        ("Old Marrowby-on-Sea", True),
        ("", False),
    ],
)
def test_an_answer_counts_as_whole_words_whatever_the_case(text: str, correct: bool) -> None:
    assert is_correct(text, {"answer": "Marrowby"}) is correct
    assert is_correct(text, {"answers": ["nowhere", "Marrowby"]}) is correct


def contents(prompts: list[Messages]) -> list[list[str]]:
    return [[turn["content"] for turn in prompt] for prompt in prompts]


def test_prompts_come_from_the_recipe_a_file_or_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("tiny", ("compare.prompts=[one, two]", "compare.system=Be brief."))
    assert contents(read_prompts(recipe, None)) == [["Be brief.", "one"], ["Be brief.", "two"]]
    file = tmp_path / "prompts.txt"
    file.write_text("\ufefffirst\n\n  second\u2028still second\r\n")
    assert contents(read_prompts(load("tiny"), str(file))) == [["first"], ["second\u2028still second"]]
    for text, due in (("a\n{b}\n", [["a"], ["{b}"]]), ('{"prompt": "a"}\n\n{"prompt": "b"}', [["a"], ["b"]])):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert contents(read_prompts(load("tiny"), "-")) == due


def test_rows_of_any_layout_ask_their_last_turn(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    again = [*user, {"role": "user", "content": "c"}]
    for row, due in (
        ({"messages": again}, ["Be brief.", "a", "b", "c"]),
        ({"messages": user}, ["Be brief.", "a"]),
        ({"messages": [{"role": "system", "content": "s"}, *user]}, ["s", "a"]),
        ({"conversations": [{"from": "human", "value": "a"}]}, ["Be brief.", "a"]),
        ({"prompt": again, "chosen": "x", "rejected": "y"}, ["Be brief.", "a", "b", "c"]),
        ({"chosen": user, "rejected": user}, ["Be brief.", "a"]),
        ({"instruction": "a", "input": "b", "output": "c"}, ["Be brief.", "a\n\nb"]),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        assert contents(read_prompts(load("tiny", ("compare.system=Be brief.",)), str(file))) == [due]


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    recipe = load("tiny")
    empty = tmp_path / "empty.txt"
    empty.touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n\n{"prompt": " "}\n{"prompt": 3}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    for file, said in (
        (empty, "no prompt in it"),
        (tmp_path / "absent.txt", "there is no such file"),
        (rows, "row 3: a user turn is empty.*\n.*row 4: something else"),
        (broken, "row 2: is not valid JSON"),
    ):
        with pytest.raises(UserError, match=said):
            read_prompts(recipe, str(file))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"messages": []}\n')
    with pytest.raises(UserError, match="row 1"):
        read_questions(load("tiny", (f"compare.questions={questions}",)))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "How many?"}], "answer": 3},
        {"messages": [{"role": "user", "content": "How many?"}], "answers": []},
        {"messages": [{"role": "user", "content": "How many?"}], "answers": ["three", 3]},
        {"messages": [{"role": "user", "content": "How many?"}], "answer": " "},
        {"messages": "How many?", "answer": "three"},
    ],
)
def test_a_question_without_an_answer_to_look_for_is_found_before_anything_is_asked(
    row: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match="row 1: JSON lines of"):
        read_questions(load("tiny", (f"compare.questions={file}",)))
