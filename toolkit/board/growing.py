"""metrics.jsonl of runs that go on: only what was added since the last look is read."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from toolkit.report.curves import Series
from toolkit.report.run_record import add_entries

MOST_KEPT = 32  # runs whose series stay in memory: 10,000 steps take some 10 MB


class Growing:
    """The series of one file. A file that was replaced, as a continued run does, is read anew."""

    def __init__(self, file: Path):
        self._file = file
        self._inode = self._read = 0
        self.series: dict[str, Series] = {}

    def update(self) -> dict[str, Series]:
        try:
            with self._file.open("rb") as stream:
                state = self._file.stat()
                if state.st_ino != self._inode or state.st_size < self._read:
                    self._inode, self._read, self.series = state.st_ino, 0, {}
                stream.seek(self._read)
                added = stream.read()
        except OSError:
            self._inode, self._read, self.series = 0, 0, {}
            return self.series
        whole = added.rfind(b"\n") + 1  # the rest is still being written
        self._read += whole
        add_entries(self.series, filter(None, map(_entry, added[:whole].splitlines())))
        return self.series


class Kept:
    """The series that were looked at last."""

    def __init__(self) -> None:
        self._of: OrderedDict[Path, Growing] = OrderedDict()

    def series(self, file: Path) -> dict[str, Series]:
        growing = self._of.setdefault(file, Growing(file))
        self._of.move_to_end(file)
        while len(self._of) > MOST_KEPT:
            self._of.popitem(last=False)
        return growing.update()


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
