"""What is otherwise than it was when a model was trained: field by field, with both values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def between(
    before: Mapping[str, Any], now: Mapping[str, Any], fields: Iterable[str] | None = None
) -> dict[str, str]:
    """Field -> "sft.max_rows: 5 then, None now" of those that differ; of a list of sections its values one by one."""
    found = {}
    for field in sorted(before.keys() | now.keys() if fields is None else fields):
        differing = apart(field, before.get(field), now.get(field))
        if listed := [f"{path}: {then!r} then, {here!r} now" for path, then, here in differing]:
            found[field] = ", ".join(listed)
    return found


def apart(field: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """(path, value, other value) wherever two values of a field differ."""
    left, right = dict(_leaves(field, one)), dict(_leaves(field, other))
    return [
        (path, left.get(path), right.get(path))
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if not items:
        yield path, value
    for key, item in items:
        yield from _leaves(f"{path}.{key}", item)
