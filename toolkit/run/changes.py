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
        then, here = dict(_leaves(field, before.get(field))), dict(_leaves(field, now.get(field)))
        listed = [
            f"{path}: {then.get(path)!r} then, {here.get(path)!r} now"
            for path in dict.fromkeys([*then, *here])
            if then.get(path) != here.get(path)
        ]
        if listed:
            found[field] = ", ".join(listed)
    return found


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
