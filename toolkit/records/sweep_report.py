"""sweep.json: which runs belong together and what tells them apart. What came of each stands in its own directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.records.record import Record


@dataclass(frozen=True)
class Sweep(Record):
    """`points` has the varied values of each run by its name, `refused` why one could not begin or go on."""

    recipe: str | None
    stage: str | None
    varied: dict[str, list[Any]] | None
    points: dict[str, dict[str, Any]] | None
    refused: dict[str, str] | None
