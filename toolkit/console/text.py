"""How text reaches a terminal: nothing in a row, a name, a path or a token steers it, and no data ends a run.

Whoever puts data into a string with rich's markup puts it through `rich.markup.escape`; the rest is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

# C0 and C1 controls but tab and line feed, and halves of characters
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def wrapped(text: Text, width: int) -> Text:
    """The text in lines of so many columns, broken between words; a longer word stays whole: a path can be copied."""
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        breaks, column = [], cell_len(line.plain) - cell_len(line.plain.lstrip())
        for word in re.finditer(r"\S+\s*", line.plain):
            if word.start() and column + cell_len(word[0].rstrip()) > width:
                breaks.append(word.start())
                column = 0
            column += cell_len(word[0])
        parts = list(line.divide(breaks))
        for part in parts[:-1]:
            part.rstrip()
        lines += parts
    return Text("\n").join(lines)


class Terminal(Console):
    """A console whose text is `visible`; only rich itself, for colours and the cursor, sends control characters."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """On a terminal a text wraps between words; elsewhere it is one line however long, so that grep finds it."""
        if all(isinstance(item, (str, Text)) for item in objects):
            if self.file.isatty() and len(objects) == 1:
                item = objects[0]
                text = item if isinstance(item, Text) else self.render_str(item, markup=options.get("markup"))
                objects = (wrapped(text, self.width),)
            options["soft_wrap"] = True
        super().print(*objects, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            harmless = segment.control or not _CONTROL.search(segment.text)
            yield segment if harmless else Segment(visible(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        try:
            return super().render_str(text, **options)
        except MarkupError:  # brackets that are none of ours
            return Text(text)
