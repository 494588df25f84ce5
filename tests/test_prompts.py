"""Prompts from a recipe or a file, and what counts as a correct answer."""

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.prompts import as_messages, is_correct, read_prompts, read_questions
from toolkit.recipe import load


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


def test_prompts_come_from_the_recipe_or_a_file(tmp_path: Path) -> None:
    recipe = load("tiny", ("compare.prompts=[one, two]", "compare.system=Be brief."))
    assert read_prompts(recipe, None) == ["one", "two"]
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  second\u2028still second\n")
    assert read_prompts(recipe, file) == ["first", "second\u2028still second"]
    assert [turn["role"] for turn in as_messages(recipe, "x")] == ["system", "user"]


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    recipe = load("tiny")
    empty = tmp_path / "empty.txt"
    empty.touch()
    for file, said in ((empty, "no prompt in it"), (tmp_path / "absent.txt", "cannot be read")):
        with pytest.raises(UserError, match=said):
            read_prompts(recipe, file)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"messages": []}\n')
    with pytest.raises(UserError, match="row 1"):
        read_questions(load("tiny", (f"compare.questions={questions}",)))
