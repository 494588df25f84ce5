"""A JSON file as a frozen dataclass: its fields are the keys, whoever writes one writes it through its type.

A field without a default is always in the file, null where nothing is known. One with the default None is there only
where there is something to say. Fields that a reader may meet without a value say so in their type: `float | None`.
"""

from __future__ import annotations

import json
import types
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from toolkit.files import write_json
from toolkit.redaction import blanked

NUM_NAMED = 8  # keys of one kind in a note

Kind = TypeVar("Kind", bound="Record")


@dataclass(frozen=True)
class Record:
    """The base of them all, and of the objects inside."""

    @classmethod
    def unknown(cls) -> Self:
        """One that says nothing yet: None in every field. `dataclasses.replace` fills in what is known."""
        return cls(**{field.name: None for field in fields(cls)})

    @classmethod
    def load(cls, path: Path, notes: list[str] | None = None) -> Self | None:
        """What the file holds; None when there is none, or nothing that can be read as such a record.

        A file of another version of the toolkit is read as far as it goes: keys that are not known are left out,
        missing ones and those of another kind are None. One line added to `notes` says which.
        """
        stored = _bytes(path)
        if stored is None:
            return None
        found, reading = _object(stored), _Reading()
        record = None if found is None else reading.record(cls, found)
        if notes is not None:
            if found is None:
                notes.append(f"{path} holds no JSON object and counts as absent")
            elif said := reading.said():
                notes.append(f"{path} is of another version of the toolkit: {said}")
        return record

    def write(self, path: Path) -> None:
        """Writes the file, complete or not at all; NaN becomes null, secrets are blanked."""
        write_json(path, blanked(plain(self)))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object as it lies there; {} for whatever is none."""
    return _object(_bytes(path) or b"") or {}


def read_lines(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, or of its end. What else a line holds is passed over; no file has none."""
    try:
        stream = path.open(encoding="utf-8", errors="replace")
        if last_bytes is not None:
            stream.seek(max(0, path.stat().st_size - last_bytes))
    except OSError:
        return
    with stream:
        for line in stream:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def plain(value: Any) -> Any:
    """The same tree of what JSON knows: records as objects, without the fields that have nothing to say."""
    if is_dataclass(value):
        return {
            field.name: plain(item)
            for field in fields(value)
            if (item := getattr(value, field.name)) is not None or _is_always_there(field)
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


class _Misfit(Exception):
    """A value of another kind than its field, or an object that lacks what its type cannot do without."""


class _Reading:
    """One file as it is read, and what in it is otherwise than its type says: dotted keys."""

    def __init__(self) -> None:
        self.unknown: list[str] = []
        self.missing: list[str] = []
        self.misfits: list[str] = []

    def said(self) -> str:
        """All of it in one line; "" when there is nothing to say."""
        kinds = {"unknown keys": self.unknown, "missing": self.missing, "of another kind": self.misfits}
        return "; ".join(f"{kind}: {_named(keys)}" for kind, keys in kinds.items() if keys)

    def record(self, kind: type[Kind], found: dict[str, Any]) -> Kind | None:
        """`kind` from a JSON object; None where it lacks what `kind` cannot do without."""
        try:
            return self._record(kind, found, "")
        except _Misfit:
            self.misfits.append("the whole")
            return None

    def _record(self, kind: type[Kind], found: dict[str, Any], path: str) -> Kind:
        hints = _hints(cast(Hashable, kind))
        self.unknown += [f"{path}{key}" for key in found if key not in hints]
        values = {}
        for field in fields(kind):
            hint, place = hints[field.name], f"{path}{field.name}"
            if field.name in found:
                values[field.name] = self._value(hint, found[field.name], place)
                continue
            if _is_always_there(field):
                self.missing.append(place)
            if not _may_be_none(hint):
                raise _Misfit
            values[field.name] = None
        return kind(**values)

    def _value(self, hint: Any, value: Any, place: str) -> Any:
        """`value` as the kind that `hint` names; None, and said, where it is of another and may be None."""
        if hint is Any:
            return value
        members, may_be_none = _members(hint), _may_be_none(hint)
        if value is None and may_be_none:
            return None
        for member in members:
            try:
                return self._of_kind(member, value, place)
            except _Misfit:
                continue
        if not may_be_none:
            raise _Misfit
        self.misfits.append(place)
        return None

    def _of_kind(self, kind: Any, value: Any, place: str) -> Any:
        if type(value) is kind:
            return value
        origin, inner = get_origin(kind) or kind, get_args(kind)
        if is_dataclass(kind) and isinstance(value, dict):
            return self._record(cast(type[Record], kind), value, f"{place}.")
        if origin is dict and isinstance(value, dict):
            return self._entries(inner[1], value, place)
        if origin is list and isinstance(value, list):
            return [self._value(inner[0], item, f"{place}[{index}]") for index, item in enumerate(value)]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return value  # JSON tells 1 and 1.0 apart, and nobody else does
        raise _Misfit

    def _entries(self, hint: Any, found: dict[str, Any], place: str) -> dict[str, Any]:
        """A dict without the entries that are of another kind: one damaged model does not take the others along."""
        entries = {}
        for key, item in found.items():
            try:
                entries[key] = self._value(hint, item, f"{place}.{key}")
            except _Misfit:
                self.misfits.append(f"{place}.{key}")
        return entries


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_always_there(field: Field[Any]) -> bool:
    return field.default is MISSING


@cache
def _members(hint: Any) -> tuple[Any, ...]:
    """The kinds that a value may be of, beside None."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    return tuple(kind for kind in get_args(hint) if kind is not types.NoneType) if is_union else (hint,)


@cache
def _may_be_none(hint: Any) -> bool:
    return hint is Any or types.NoneType in get_args(hint)


def _named(keys: Iterable[str]) -> str:
    names = list(dict.fromkeys(keys))
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _object(stored: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(stored)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
