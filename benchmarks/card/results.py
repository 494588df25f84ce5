"""What was measured, on disk after every point, and the clock that a start has."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import write_json

MOST_ATTEMPTS = 2  # a point that failed so often is left alone


class Clock:
    """The seconds of one start. Nothing begins that would not end within them by what it took before."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def allows(self, seconds: float) -> bool:
        return self.left() >= seconds


@dataclass
class Results:
    """points[measurement][point]: figures, `seconds`, and `failed` with the number of `attempts` where there are none.

    `identity` is what all figures of a file have in common: the size, the card, the versions.
    """

    file: Path
    identity: dict[str, Any]
    id: str
    points: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, file: Path, identity: dict[str, Any]) -> Results:
        """What the file holds, or nothing yet. Raises UserError for a file of another card, size or stack."""
        if not file.exists():
            return cls(file, identity, secrets.token_hex(4))
        stored = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key, value in identity.items() if stored["identity"].get(key) != value]
        if other:
            told = "; ".join(
                f"{key}: {stored['identity'].get(key)} there, {identity[key]} here" for key in other
            )
            raise UserError(
                f"{file} was measured under other conditions ({told}): name another file with --out"
            )
        return cls(file, identity, stored["id"], stored["points"], stored["starts"])

    def figures(self, measurement: str, point: str) -> dict[str, Any] | None:
        """What was measured there; None where nothing was."""
        found = self.points.get(measurement, {}).get(point)
        return None if found is None or "failed" in found else found

    def is_settled(self, measurement: str, point: str) -> bool:
        found = self.points.get(measurement, {}).get(point)
        return found is not None and ("failed" not in found or found["attempts"] >= MOST_ATTEMPTS)

    def longest_seconds(self, measurement: str) -> float | None:
        """Of the points of a measurement so far."""
        found = self.points.get(measurement, {}).values()
        return max((point["seconds"] for point in found), default=None)

    def put(self, measurement: str, point: str, figures: dict[str, Any], seconds: float) -> None:
        self.points.setdefault(measurement, {})[point] = figures | {"seconds": seconds}
        self.write()

    def put_failure(self, measurement: str, point: str, said: str, seconds: float) -> None:
        before = self.points.get(measurement, {}).get(point, {})
        self.put(measurement, point, {"failed": said, "attempts": before.get("attempts", 0) + 1}, seconds)

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.file,
            {"identity": self.identity, "id": self.id, "starts": self.starts, "points": self.points},
        )
