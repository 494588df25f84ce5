"""A comparison as Markdown, on a terminal, and as a page that no text can break."""

import io
import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolkit.compare.page import _differing, _words, page
from toolkit.compare.view import comparison_markdown, show_answers, show_measures, streaming
from toolkit.recipe.load import load
from toolkit.records.comparison_report import AnswerMeasures

NAMES = ("base", "dpo")
NONE = AnswerMeasures.unknown()


def row(prompt: str, *answers: str, earlier: str = "") -> dict[str, Any]:
    turns = (
        [{"role": "user", "content": earlier}, {"role": "assistant", "content": "Yes."}] if earlier else []
    )
    return {
        "prompt": prompt,
        "messages": [*turns, {"role": "user", "content": prompt}],
        "answers": dict(zip(NAMES, answers, strict=True)),
        "measured": {name: {"num_tokens": 3, "ended": name == "dpo", "seconds": 0.1} for name in NAMES},
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int, height: int) -> Console:
    return Console(file=Terminal(), force_terminal=True, width=width, height=height, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown_holds_every_turn_and_quotes_every_line() -> None:
    rows = [row("Why?", "one\n\n# two", ""), row("And\nthen?", "a", "b", earlier="First.")]
    text = comparison_markdown(load("tiny"), rows, {"base": replace(NONE, ended_fraction=0.0), "dpo": NONE})
    assert "## Why?" in text and "> one\n> \n> # two" in text and "> (empty)" in text
    assert "## Prompt 2" in text and "> First." in text and "> And\n> then?" in text
    assert "**base** (did not end by itself)" in text and "| ended by itself | 0.0% | - |" in text


def test_a_measure_of_the_recipe_stands_everywhere_under_its_own_name() -> None:
    models = {
        "base": replace(NONE, matches={"brief": 0.25, "endless": None}),
        "dpo": replace(NONE, matches={"brief": 1.0}),
    }
    console = terminal(80, 24)
    show_measures(models, console)
    assert re.search(r"brief +25\.0% +100\.0%", shown(console)) and "endless" not in shown(console)
    assert "| brief | 25.0% | 100.0% |" in comparison_markdown(load("tiny"), [], models)
    assert '["brief", "25.0%", "100.0%"]' in page(load("tiny"), [], models)


@pytest.mark.parametrize("width", [120, 40])
def test_answers_stand_side_by_side_where_there_is_room(width: int) -> None:
    console = terminal(width, 40)
    show_answers([row("Why?", "because \x1b[2J of [red]this[/red]", "therefore")], NAMES, console)
    text = shown(console)
    assert "\x1b" not in text and "[red]" in text and "did not" in text
    together = any("because" in line and "therefore" in line for line in text.splitlines())
    assert together == (width == 120)
    show_measures({"base": replace(NONE, tokens_per_second=1234.5), "dpo": NONE}, console)
    assert re.search(r"tokens/s +1,234 +-", shown(console))


def test_a_growing_view_is_never_higher_than_the_terminal_and_leaves_nothing() -> None:
    console = terminal(80, 24)
    prompts = [[{"role": "user", "content": f"prompt {number}"}] for number in range(9)]
    with streaming(prompts, NAMES, console) as hear:
        hear("base", lambda: dict.fromkeys(range(9), "long " * 200))
        deadline = time.monotonic() + 20
        while "long" not in (drawn := shown(console)) and time.monotonic() < deadline:
            time.sleep(0.02)
    drawn = drawn.rpartition("\x1b[1A")[2]  # the last that was drawn
    assert "prompt 0" in drawn and "more at the same time" in drawn
    assert drawn.count("\n") < 24
    assert shown(console).count("\x1b[1A") >= drawn.count("\n")  # went back over every line
    plain = Console(file=io.StringIO(), width=80)
    with streaming(prompts, NAMES, plain) as hear:
        hear("base", lambda: {0: "text"})
    assert shown(plain) == ""


@given(st.text(alphabet="ab \n", max_size=40), st.text(alphabet="ab \n", max_size=40))
def test_words_are_the_text_and_what_is_not_marked_is_in_the_other(before: str, after: str) -> None:
    words = _words(after)
    assert "".join(words) == after
    marked = {place for start, end in _differing(_words(before), words) for place in range(start, end)}
    common = [word.strip() for place, word in enumerate(words) if place not in marked]
    others = iter(word.strip() for word in _words(before))
    assert all(word in others for word in common)  # in this order
    assert not _differing(words, words)


def test_no_text_ends_the_page_early() -> None:
    evil = "</script><script>alert(1)</script><!--<b>\u2028\ud800"
    text = page(load("tiny"), [row(evil, evil, evil)], {"base": NONE, "dpo": NONE})
    assert text.count("</script>") == 2 and "alert(1)</" not in text
    content = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert content and json.loads(content[1])["rows"][0]["turns"][0]["content"] == evil
    text.encode()
    assert "http" not in text.replace("http-equiv", "")
