"""The console of a run and its log.txt: what is shown where, and what never is."""

import io
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from tests.conftest import ROOT
from toolkit.console.screen import Screen, Steady, bar
from toolkit.errors import UserError
from toolkit.run.runlog import LOG, OURS, PRINTED, failure

LONG = "word " * 40 + "end"
SHOWS = f"""
import warnings, logging
from pathlib import Path
from rich.table import Table
from toolkit.console.screen import Screen, bar
screen = Screen()
screen.print("[green]{LONG}[/]")
with bar(screen, "saving", None): pass
with bar(screen, "counting", 3) as advance: advance(3)
warnings.warn("the loss is NaN")
logging.getLogger("transformers.trainer").warning("no news")
print("\\x1b[31mraw" if False else "end of it")
"""


def shown(**environment: str) -> bytes:
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    done = subprocess.run(
        [sys.executable, "-c", SHOWS], cwd=ROOT, env=variables | environment, capture_output=True, check=True
    )
    assert done.stderr == b"", done.stderr
    return done.stdout


def on_a_terminal(**environment: str) -> bytes:
    """What the same program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SHOWS],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(os.environ) | environment,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while more := os.read(ours, 4096):
            said += more
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, said
    return said


def test_a_pipe_gets_whole_lines_and_no_escape_codes() -> None:
    said = shown()
    assert said.decode().splitlines() == [LONG, "saving", "counting", "end of it"]
    assert shown(NO_COLOR="1", TERM="dumb") == said


def test_a_terminal_gets_bars_and_a_dumb_one_plain_lines() -> None:
    assert b"\x1b[" in on_a_terminal(TERM="xterm-256color")
    colourless = on_a_terminal(TERM="xterm-256color", NO_COLOR="1")
    assert b"\x1b[32m" not in colourless and b"saving" in colourless
    assert b"\x1b" not in on_a_terminal(TERM="dumb")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    LOG.close_file()
    LOG._waiting.clear()
    yield tmp_path / "run" / "log.txt"
    LOG.close_file()


def screen(quiet: bool = False) -> tuple[Screen, io.StringIO]:
    stream = io.StringIO()
    return Screen(quiet=quiet, file=stream), stream


def test_what_was_said_before_the_run_directory_exists_comes_first(log: Path) -> None:
    console, stream = screen()
    console.print(f"[bold]{LONG}[/]")
    PRINTED.info("a banner")
    LOG.open(log, console)
    console.print("[yellow]look out[/] here")
    lines = log.read_text().splitlines()
    assert lines[1].startswith("=== attempt 1 · process ")
    assert [line[21:] for line in lines[2:]] == [
        f"[toolkit] {LONG}", "[printed] a banner", "[toolkit warning] look out here"
    ]  # fmt: skip
    stamp = time.strptime(lines[2][:20], "%Y-%m-%d %H:%M:%SZ")
    assert abs(time.mktime(stamp) - time.mktime(time.gmtime())) < 60
    assert "a banner" not in stream.getvalue()
    LOG.open(log, console)
    assert "\n=== attempt 2 · " in log.read_text()


def test_libraries_reach_the_log_and_what_is_important_the_screen_too(log: Path) -> None:
    console, stream = screen()
    LOG.open(log, console)
    library = logging.getLogger("transformers.trainer")
    library.warning("use_cache is set to False")
    library.warning("financing information")
    for _ in range(2):
        library.warning("the gradient norm is nan [x]")
    library.error("the file is broken")
    assert (
        stream.getvalue() == "transformers: the gradient norm is nan [x]\ntransformers: the file is broken\n"
    )
    written = log.read_text()
    assert (
        written.count("[transformers warning]") == 4 and "[transformers error] the file is broken" in written
    )


def test_quiet_leaves_warnings_errors_and_results_and_log_txt_whole(log: Path) -> None:
    console, stream = screen(quiet=True)
    LOG.open(log, console)
    said = [
        "[dim]loading[/]",
        "[yellow]slow[/] disk",
        "step 1",
        "[bold green]finished[/]",
        "[bold red]error[/]",
    ]
    for line in said:
        console.print(line)
    with bar(console, "counting", 3) as advance:
        advance(3)
    assert stream.getvalue() == "slow disk\nfinished\nerror\n"
    assert all(line in log.read_text() for line in ("loading", "slow disk", "step 1", "counting", "finished"))


class Meanwhile:
    """Something to print, while another thread draws a live display that has grown."""

    def __init__(self, display: Live) -> None:
        self.display = display
        self.drawing = threading.Thread(target=self.grow)

    def grow(self) -> None:
        self.display.update("a frame\nof two lines", refresh=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console is self.display.console and not self.drawing.ident:
            self.drawing.start()
            self.drawing.join(0.5)
        yield "the line"


def test_nothing_is_drawn_while_a_line_is_printed() -> None:
    stream = io.StringIO()
    console = Screen(file=stream, force_terminal=True)
    with Live("a frame", console=console, auto_refresh=False) as display:
        line = Meanwhile(display)
        console.print(line)
        line.drawing.join()
    assert 0 < stream.getvalue().index("the line") < stream.getvalue().index("of two lines")


def test_no_secret_reaches_the_log(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr(
        sys, "argv", ["run_sft.py", "--set", "model.path=hf_abcdefghijklmnopqrstuvwxyzabcdefgh"]
    )
    console, _ = screen()
    LOG.open(log, console)
    console.print("key 0123456789abcdef0123456789abcdef01234567")
    PRINTED.info("Authorization token=abc123secret")
    try:
        raise RuntimeError("no access with hf_abcdefghijklmnopqrstuvwxyzabcdefgh")
    except RuntimeError as error:
        failure(error)
    written = log.read_text()
    assert "Traceback" in written and "no access with ***" in written
    assert not any(secret in written for secret in ("0123456789abcdef", "abc123secret", "hf_abc"))


def test_a_users_error_has_no_traceback_in_the_log(log: Path) -> None:
    LOG.open(log, screen()[0])
    failure(UserError("the disk is full: make room"))
    assert "[toolkit error] the disk is full: make room" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_log_that_cannot_be_written_ends_nothing(log: Path) -> None:
    log.parent.parent.joinpath("run").write_text("a file where the directory should be")
    console, stream = screen()
    LOG.open(log, console)
    console.print("still here")
    OURS.info("%s")
    assert stream.getvalue() == "still here\n"


def test_a_terminal_that_went_away_ends_nothing() -> None:
    ours, theirs = os.pipe()
    stream = os.fdopen(theirs, "w")
    os.close(ours)
    console = Screen(file=Steady(stream))
    for _ in range(3):
        console.print("nobody hears this")
        console.file.flush()
    assert not console.file.isatty()


def test_what_a_narrow_encoding_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", write_through=True)
    Screen(file=Steady(stream)).print("sft · tiny")
    assert raw.getvalue() == b"sft ? tiny\n"
