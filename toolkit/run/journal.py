"""JSON lines appended as they come. A disk that is full delays them; it never ends a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_HELD = 1000  # lines that wait for room; then the oldest are given up


class Journal:
    """A file of JSON lines, each complete or absent. `warn` is told once when one cannot be written."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path = path
        self._warn = warn
        self._held: list[bytes] = []
        self._warned = False

    def write(self, entry: dict[str, Any]) -> None:
        """Appends `entry`, and before it those that found no room earlier."""
        self._held = [*self._held, (json.dumps(entry) + "\n").encode()][-MOST_HELD:]
        try:
            with self._path.open("ab", buffering=0) as stream:
                while self._held:
                    _append(stream, self._held[0])
                    del self._held[0]
        except OSError as error:
            if not self._warned:
                self._warn(f"{self._path.name} cannot be written ({error.strerror}); the run goes on")
            self._warned = True


def _append(stream: Any, line: bytes) -> None:
    """One line or nothing of it. Raises OSError."""
    start, done = stream.seek(0, 2), 0
    try:
        while done < len(line):  # the kernel may take a part where room ends, and fails on the next call
            done += stream.write(line[done:])
    except OSError:
        stream.truncate(start)
        raise
