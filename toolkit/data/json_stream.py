"""The values of a JSON text that is larger than memory should hold, decoded one at a time. Pure."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any


class Repeated(dict[str, Any]):
    """An object in which, however deep, a key is named twice: all but the last of its values are lost."""


class Decoder(json.JSONDecoder):
    """Decodes as json.loads does; a top-level object with repeated keys is a `Repeated`."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self._num_repeated = 0

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        before = self._num_repeated
        value, end = super().raw_decode(s, idx)
        return (Repeated(value) if isinstance(value, dict) and self._num_repeated > before else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        self._num_repeated += len(found) < len(pairs)
        return found


_BETWEEN = re.compile(r"[ \t\r\n,]*")
_ENDS_OPEN = 16  # characters: longer than any literal or escape that the end of a chunk can split


def values(chunks: Iterator[str], max_chars: int) -> Iterator[Any]:
    """The elements of an array, or values that follow one another; `chunks` are the text in pieces.

    Raises json.JSONDecodeError where the text is not JSON, ends too early or goes on after the array, ValueError for a
    value of more than `max_chars` characters, and what `chunks` raises.
    """
    decoder = Decoder()
    text = next(chunks, "").lstrip()
    is_array = text.startswith("[")
    at = int(is_array)
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        if is_array and text.startswith("]", at):
            _end(text, at + 1, chunks)
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


def _end(text: str, at: int, chunks: Iterator[str]) -> None:
    """Raises JSONDecodeError unless only white space follows."""
    for rest in itertools.chain([text[at:]], chunks):
        if rest.strip():
            raise json.JSONDecodeError("something follows the array; a file holds one", rest, 0)
