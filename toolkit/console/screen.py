"""The console of a run: what it shows stands in log.txt too, and losing the terminal does not end anything.

Colour is meaning here: a line that begins yellow warns, bold red is an error, bold green is a result. Those three are
what `--quiet` leaves.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.control import Control
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from toolkit.console.panel import CTRL_C, duration
from toolkit.console.text import Terminal
from toolkit.run.runlog import OURS, listen

WARNING, LOUD = "[yellow]", ("[yellow]", "[bold red]", "[bold green]")
SPINS_PER_SECOND = 4
LOG_WIDTH = 110  # of tables and panels in log.txt; a line of text is never wrapped


class Steady(io.TextIOBase):
    """Standard output that a closed terminal, a broken pipe or no output at all turns silent instead of failing."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._gone = stream is None  # as Python says it of a closed descriptor

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self._gone and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no output")
        return self._stream.fileno()  # type: ignore[no-any-return]

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):
                self._gone = True
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._gone = True


class Screen(Terminal):
    """A console on standard output, as it is when this is made: what libraries redirect later does not move it."""

    def __init__(self, quiet: bool = False, **options: Any):
        super().__init__(**{"file": Steady(sys.stdout), **options})
        self.quiet = quiet
        self._plain = Terminal(file=io.StringIO(), color_system=None, width=LOG_WIDTH)
        listen()

    def print(self, *objects: Any, **options: Any) -> None:
        if any(isinstance(item, Control) for item in objects):  # a live display moves the cursor
            super().print(*objects, **options)
            return
        first = objects[0] if objects and isinstance(objects[0], str) else ""
        is_text = all(isinstance(item, str) for item in objects)
        self._log(objects, options, is_text, first.startswith(WARNING))
        quiet = self.quiet
        self.quiet = quiet and not first.startswith(LOUD)
        try:
            with self._undisturbed():
                super().print(*objects, **options)
        finally:
            self.quiet = quiet

    def _undisturbed(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps a live display from drawing meanwhile: between a line's movements of the cursor and the line itself a
        frame of another height would leave a border behind."""
        return self._live_stack[0]._lock if self._live_stack else contextlib.nullcontext()

    def _log(self, objects: tuple[Any, ...], options: dict[str, Any], is_text: bool, warns: bool) -> None:
        with self._plain.capture() as captured:
            self._plain.print(*objects, **({"soft_wrap": is_text} | options))
        text = captured.get()
        if text.strip():
            (OURS.warning if warns else OURS.info)("%s", text)


def is_live(console: Console) -> bool:
    """Whether something that moves can be shown: a terminal that understands it, and nobody asked for quiet."""
    return console.is_interactive and not console.quiet and console.file.isatty()


def live(console: Console, draw: Callable[[], RenderableType], per_second: float) -> Live:
    """A display that is drawn so often by a thread, and leaves nothing behind when it is stopped."""
    return Live(
        console=console,
        get_renderable=draw,
        refresh_per_second=per_second,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def bar(
    console: Console, title: str, total: int | None, detail: Callable[[], str] = str
) -> Iterator[Callable[..., None]]:
    """Shows work in progress; yields a function that advances it by a count.

    On a terminal a bar, or a spinner where `total` is None, and a line with its time when it is done; elsewhere one
    line at the start. `detail` says, whenever it is drawn, what else is known.
    """
    started = time.perf_counter()
    if is_live(console):
        OURS.info("%s", title)
        columns = (
            (
                BarColumn(),  # the one that gives way on a narrow terminal
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
            )
            if total is not None
            else (TimeElapsedColumn(),)
        )
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            *columns,
            console=console,
        )
        task = progress.add_task(escape(title), total=total)

        def draw() -> RenderableType:
            progress.update(task, description=escape(f"{title} {detail()}".strip()))
            return Constrain(progress.get_renderable(), console.width - CTRL_C)

        with live(console, draw, SPINS_PER_SECOND):
            yield lambda count=1: progress.advance(task, count)
        console.print(f"[dim]{escape(title)}: {duration(time.perf_counter() - started)}[/]")
        return
    console.print(escape(title))
    yield lambda count=1: None
    OURS.info("%s: %s", title, duration(time.perf_counter() - started))
