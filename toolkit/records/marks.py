"""The files that are written last and say that a folder is complete: sealed.json of a checkpoint, complete.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.records.record import Record


@dataclass(frozen=True)
class Seal(Record):
    """`files` are the BLAKE2b hashes of the folder's files, by their path in it."""

    files: dict[str, str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Made(Seal):
    """sealed.json of a checkpoint: what of the recipe shaped its weights, and what did beside it; see `Manifest`."""

    trajectory: dict[str, Any] | None
    conditions: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class AdapterMark(Made):
    """complete.json of an adapter; `num_steps` is after how many steps."""

    num_steps: int | None


@dataclass(frozen=True, kw_only=True)
class ExportMark(Seal):
    """complete.json of an export: what it is made of, and whether it was checked against the trained model."""

    recipe: str | None
    stage: str | None
    format: str | None
    quant: str | None
    base: str | None
    revision: str | None
    base_16bit: str | None
    adapter_sha256: str | None
    verified: bool | None
