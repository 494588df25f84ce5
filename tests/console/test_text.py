"""Data on a terminal: it neither steers it, nor is it taken for markup, nor ends a run."""

import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from toolkit.console.screen import Screen, Steady
from toolkit.console.text import Terminal

EVIL = "\x1b[2Jgone\x9b1m\x00 [red]x[/b] :warning: \ud800"


def printed(*objects: object, **options: object) -> str:
    stream = io.StringIO()
    Terminal(file=stream, width=200, force_terminal=True, color_system="standard").print(*objects, **options)
    return stream.getvalue()


def test_whatever_is_printed_steers_nothing() -> None:
    table = Table()
    table.add_column(Text(EVIL))
    table.add_row(Text(EVIL))
    for item in (EVIL, Text(EVIL), table, Panel(Text("x"), title=Text(EVIL))):
        said = printed(item)
        assert "\x1b[2J" not in said and not {"\x9b", "\x00", "\ud800"} & set(said)
        assert "gone" in said and ":warning" in said


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 33, 80])
def test_a_text_wraps_between_words_and_a_path_stays_whole(width: int) -> None:
    text = "  no file at /a/path/that/is/longer/than/a/line.jsonl: name one, or two\nof them"
    stream, piped = Tty(), io.StringIO()
    Terminal(file=stream, width=width).print(text)
    Terminal(file=piped, width=width).print(text)
    lines = stream.getvalue().splitlines()
    assert " ".join(stream.getvalue().split()) == " ".join(text.split()) and lines[0].startswith("  no file")
    assert all(len(line) <= width or line.startswith("/a/path") for line in lines), "nothing but the path"
    assert piped.getvalue() == text + "\n"


def test_brackets_that_are_no_markup_stand_as_they_are() -> None:
    assert "[/INST] answer" in printed("the token [/INST] answer")


def test_markup_of_our_own_still_colours() -> None:
    assert "\x1b[33m" in printed("[yellow]careful[/]")


def test_a_screen_without_an_output_is_silent() -> None:
    screen = Screen(file=Steady(None))
    screen.print("hello")
    assert not screen.file.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_of_another_encoding_gets_what_it_can_show(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    Screen(file=Steady(stream)).print("é → [bold]x[/]")
    assert b"x" in raw.getvalue()
