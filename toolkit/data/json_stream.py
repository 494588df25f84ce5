"""The values of a JSON text that is larger than memory should hold, decoded one at a time. Pure."""

import json
import re
from collections.abc import Iterator
from typing import Any

_BETWEEN = re.compile(r"[ \t\r\n,]*")
_ENDS_OPEN = 16  # characters: longer than any literal or escape that the end of a chunk can split


def values(chunks: Iterator[str], max_chars: int) -> Iterator[Any]:
    """The elements of an array, or values that follow one another; `chunks` are the text in pieces.

    Raises json.JSONDecodeError where the text is not JSON or ends too early, ValueError for a value of more
    than `max_chars` characters, and what `chunks` raises.
    """
    decoder = json.JSONDecoder()
    text = next(chunks, "").lstrip()
    is_array = text.startswith("[")
    at = int(is_array)
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        if is_array and text.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # More text can fix a string that does not end, and what is wrong at the very end.
            is_open = error.msg.startswith("Unterminated string") or error.pos > len(text) - _ENDS_OPEN
            more = next(chunks, "") if is_open else ""
            if not more and at == len(text) and not is_array:
                return
            if not more:
                raise
            if len(text) - at > max_chars:
                raise ValueError(f"one value is longer than {max_chars:,} characters") from None
            text, at = text[at:] + more, 0
        else:
            yield value
