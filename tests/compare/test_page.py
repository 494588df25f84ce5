"""comparison.html in a browser: held-out questions apart, votes that go on and back, marks that say something."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare.test_view import NONE
from tests.in_browser import look_at
from toolkit.compare.page import page
from toolkit.data.prompts import is_correct
from toolkit.recipe.load import load

NAMES = ("base", "sft", "dpo")
BASE = "Long ago the sea was as flat as a plate and nobody knew it"


def row(prompt: str, *answers: str, expected: str = "") -> dict[str, Any]:
    measured = {name: {"num_tokens": 3, "ended": True, "seconds": 0.1} for name in NAMES}
    found: dict[str, Any] = {
        "prompt": prompt,
        "messages": [{"role": "user", "content": prompt}],
        "answers": dict(zip(NAMES, answers, strict=True)),
        "measured": measured,
    }
    if expected:
        for name, answer in found["answers"].items():
            measured[name]["correct"] = is_correct(answer, {"answer": expected})
        found["expected"] = [expected]
    return found


ROWS = [
    row("Why?", BASE, "It rains in autumn.", "Of course. It rains in autumn."),
    row("Who?", BASE, "A newt in a pond.", "With pleasure. A newt in a pond."),
    row("When?", BASE, "At noon on a Monday.", "Of course. At noon on a Monday."),
    row("Which town?", BASE, "She lives in Ivering.", "Of course. In IVERING, she says.", expected="Ivering"),
    row("Which animal?", BASE, "A magpie.", "Of course. A newt.", expected="magpie"),
    row("Which trade?", BASE, "She is a baker.", "Of course. A saddler.", expected="saddler"),
]


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Any:
    file = tmp_path / "comparison.html"
    models = {name: replace(NONE, correct_fraction=0.5) for name in NAMES}
    file.write_text(page(load("tiny"), ROWS, models))
    seen = look_at(browser, file, 0)
    yield seen.page
    assert seen.complaints == []
    seen.page.context.close()


def here(page: Any) -> str:
    return str(page.locator("article.here").get_attribute("aria-label"))


def progress(page: Any) -> str:
    return str(page.locator("#progress").inner_text())


def test_questions_stand_apart_wrong_ones_first_with_the_expected_words_marked(shown: Any) -> None:
    questions = shown.locator("#questions article")
    texts = questions.all_inner_texts()
    assert [text.split("?")[0] for text in texts] == ["Which animal", "Which trade", "Which town"]
    assert "expected: magpie" in texts[0]
    assert questions.first.locator("mark.expected").all_inner_texts() == ["magpie."]
    assert questions.last.locator("mark.expected").all_inner_texts() == ["Ivering.", "IVERING,"]
    assert questions.last.locator("h3 b").all_inner_texts() == ["wrong", "right", "right"]
    shown.select_option("#filter", label="wrong answer of dpo")
    assert shown.locator("article:visible").count() == 1 and questions.first.is_visible()
    assert not shown.locator("#prompts").is_visible()
    shown.keyboard.press("b")  # names are hidden, in the choices too
    assert "dpo" not in shown.locator("#filter").inner_text()
    assert shown.locator("article:visible").count() == len(ROWS)


def test_a_vote_makes_the_next_prompt_current_and_can_be_taken_back_even_after_a_reload(shown: Any) -> None:
    shown.locator("article").first.get_by_role("button", name="sft is better").click()
    assert (here(shown), progress(shown)) == ("prompt 2", "1 of 3 voted on, 2 pairs")
    shown.keyboard.press("3")
    shown.keyboard.press("t")
    assert (here(shown), progress(shown)) == ("prompt 3", "3 of 3 voted on, 4 pairs")
    shown.locator("#questions article").first.click()
    shown.keyboard.press("1")  # a held-out question is nothing to train on
    assert progress(shown) == "3 of 3 voted on, 4 pairs"
    shown.keyboard.press("u")
    assert (here(shown), progress(shown)) == ("prompt 3", "2 of 3 voted on, 4 pairs")
    shown.reload()
    assert (here(shown), progress(shown)) == ("prompt 3", "2 of 3 voted on, 4 pairs")
    shown.click("#undo")
    assert (here(shown), progress(shown)) == ("prompt 2", "1 of 3 voted on, 2 pairs")
    shown.set_viewport_size({"width": 390, "height": 700})
    box = shown.locator("#progress").bounding_box()
    assert box and box["y"] + box["height"] <= 700  # the count is in sight wherever one votes


def test_differences_are_from_the_model_before_and_none_where_nearly_all_differs(shown: Any) -> None:
    answers = shown.locator("article").first.locator(".answer")
    assert answers.nth(1).locator("mark").count() == 0
    assert "mostly other words than base" in answers.nth(1).inner_text()
    assert answers.nth(2).locator("mark").all_inner_texts() == ["Of course."]
