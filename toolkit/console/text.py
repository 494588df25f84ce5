"""How text reaches a terminal: nothing in a row, a name, a path or a token steers it, and no data ends a run.

Whoever puts data into a string with rich's markup puts it through `rich.markup.escape`; the rest is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

# C0 and C1 controls but tab and line feed, and halves of characters
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class Terminal(Console):
    """A console whose text is `visible`; only rich itself, for colours and the cursor, sends control characters."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            harmless = segment.control or not _CONTROL.search(segment.text)
            yield segment if harmless else Segment(visible(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        try:
            return super().render_str(text, **options)
        except MarkupError:  # brackets that are none of ours
            return Text(text)
