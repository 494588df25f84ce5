"""log.txt: the story of a run in one file, every attempt of it, with the time of each line in UTC.

Python's `logging` carries it. Whatever our console shows, and whatever libraries print, warn and log, arrives at one
handler on the root logger: `LOG`. Until the run directory exists it keeps the lines; `open` writes them out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit.errors import UserError
from toolkit.redaction import redacted

OURS = logging.getLogger("toolkit")
PRINTED = logging.getLogger("toolkit.printed")  # what libraries wrote to stdout and stderr
LIBRARIES = (
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "unsloth_zoo",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
)
# The rule for the screen: errors, and a warning that a number stopped being one. The rest is in log.txt.
NOT_A_NUMBER = re.compile(r"\b(nans?|infs?|infinity|infinite|non-finite)\b", re.IGNORECASE)
HEADER = "=== attempt "
MOST_WAITING = 5000  # lines that are kept for a run directory


class RunLog(logging.Handler):
    """The handler. A disk that is full, or a directory that went away, costs lines and never the run."""

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self._descriptor: int | None = None
        self._waiting: deque[logging.LogRecord] = deque(maxlen=MOST_WAITING)
        self._console: Console | None = None
        self._shown: set[str] = set()
        self._showing = False

    def open(self, path: Path, console: Console) -> None:
        """Goes on in `path`, behind the attempts that stand there; `console` shows what is important from now on."""
        with self.lock or contextlib.nullcontext():
            self.close_file()
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                number = 1 + path.read_text(encoding="utf-8", errors="replace").count(f"\n{HEADER}")
                command = redacted(" ".join(["python", *sys.argv]))
                self._write(f"\n{HEADER}{number} · process {os.getpid()} · {command}\n")
            self.path, self._console, self._shown = path, console, set()
            while self._waiting:
                self.emit(self._waiting.popleft())

    def close_file(self) -> None:
        """Ends the file; later lines wait for the next."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self.path = self._console = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._showing:  # the line is in the file already, from where it came
            return
        if self.path is None:
            self._waiting.append(record)
            return
        with contextlib.suppress(Exception):
            self._write(_lines(record))
            self._show(record)

    def unseen(self) -> str:
        """What libraries said so far while there is no file; for a fault before the run directory exists."""
        return "".join(_lines(record) for record in self._waiting if record.name != OURS.name)

    def _write(self, text: str) -> None:
        if (
            self._descriptor is not None
        ):  # one call a record: whole lines, from forked processes and signals too
            os.write(self._descriptor, text.encode("utf-8", "replace"))

    def _show(self, record: logging.LogRecord) -> None:
        text = redacted(record.getMessage()).strip()
        if self._console is None or not is_important(record) or text in self._shown:
            return
        self._shown.add(text)
        self._showing = True
        try:
            self._console.print(f"[yellow]{record.name.partition('.')[0]}:[/] {escape(text)}")
        finally:
            self._showing = False


LOG = RunLog()


def is_important(record: logging.LogRecord) -> bool:
    """Whether a library's record is shown too: an error, or a warning that names NaN or infinity."""
    if record.name.partition(".")[0] == OURS.name:
        return False  # ours is on the screen already, and what is printed has no level
    return record.levelno >= logging.ERROR or (
        record.levelno >= logging.WARNING and bool(NOT_A_NUMBER.search(record.getMessage()))
    )


def listen() -> None:
    """From here on `LOG` hears what this process logs and warns."""
    root = logging.getLogger()
    if LOG not in root.handlers:
        root.addHandler(LOG)
        logging.captureWarnings(True)
        OURS.setLevel(logging.INFO)


def take_over() -> None:
    """Libraries that were imported lose their own handlers on stderr; their warnings come here."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def failure(error: BaseException) -> None:
    """How a run ended that did not finish; with the traceback where it is not for the user to fix."""
    if isinstance(error, UserError):
        OURS.error("%s", error)
    elif isinstance(error, Exception) and not hasattr(error, "signal"):
        OURS.error("%s", type(error).__name__, exc_info=error)
    else:
        OURS.warning("%s", str(error) or type(error).__name__)


def _lines(record: logging.LogRecord) -> str:
    """`TIME [SOURCE] text`, further lines of the text below it, indented."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(record.created))
    source = record.name.removeprefix("toolkit.") if record.name == PRINTED.name else record.name
    source = source.partition(".")[0] if source != "py.warnings" else "warnings"
    level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
    text = record.getMessage()
    if record.exc_info:
        text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
    lines = [line.rstrip() for line in redacted(text).strip("\n").split("\n")]
    return f"{stamp} [{source}{level}] " + "\n    ".join(lines) + "\n"
