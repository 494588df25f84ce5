"""What is wrong with a recipe, said to whoever wrote it: the line or the override, what was got, and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

MOST_NEAR = 3  # keys that may have been meant
MOST_SHOWN = 80  # characters of a value that is wrong


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    raw: Any,
    values: Any,
    file: Path,
    overrides: tuple[str, ...],
    of_file: Any,
) -> list[str]:
    """One line a problem, in the order of the file; the missing keys of a section share theirs.

    `values` is what was validated, `raw` the same with line numbers, `of_file` the values without the overrides. A
    problem that these do not have is one of the overrides that touch it.
    """
    before = _problems(schema, of_file) if overrides else set()
    missing: dict[tuple[Any, ...], list[str]] = {}
    found: dict[tuple[Any, ...], list[str]] = {}
    for problem in error.errors(include_url=False):
        loc = _keys_of(problem, values)
        if problem["type"] == "missing":
            missing.setdefault(loc[:-1], []).append(str(loc[-1]))
        else:
            found.setdefault(loc, []).append(_what(problem, loc, schema))
    lines = []
    for loc, whats in found.items():
        line, dotted = _line(raw, loc), ".".join(map(str, loc))
        where = f"{file.name}:{line}: {dotted or 'recipe'}"
        if overrides and not any((loc, what) in before for what in whats):
            where = _of_overrides(dotted, overrides)
        lines.append((line, f"{where}: {'; or: '.join(whats)}"))
    for loc, keys in missing.items():
        line, section = _line(raw, loc), ".".join(map(str, loc)) or "the recipe"
        lines.append(
            (line, f"{file.name}:{line}: {section} lacks {', '.join(keys)}: there is no default for that")
        )
    return [text for _, text in sorted(lines, key=lambda item: item[0])]


def _problems(schema: type[BaseModel], values: Any) -> set[tuple[tuple[Any, ...], str]]:
    """Where the values alone are wrong, and how."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return {
            (loc, _what(problem, loc, schema)) for problem in found for loc in [_keys_of(problem, values)]
        }
    return set()


def _of_overrides(dotted: str, overrides: Sequence[str]) -> str:
    """The overrides of a value, or of what is around or in it; all of them for what several values are wrong in."""
    paths = [override.partition("=")[0] for override in overrides]
    if dotted in paths:
        return f"--set {dotted}"
    touching = [path for path in paths if dotted.startswith(f"{path}.") or path.startswith(f"{dotted}.")]
    named = f"--set {' '.join(dict.fromkeys(touching or paths))}"
    return f"{named}: {dotted}" if dotted else named


def _keys_of(problem: Any, values: Any) -> tuple[str | int, ...]:
    """The path of a problem, without the branches of unions ("constrained-int") that pydantic puts into it."""
    keys: list[str | int] = []
    if problem["loc"][-1:] == ("[key]",):  # what is wrong is a name in a mapping of free names
        problem = problem | {"loc": problem["loc"][:-2]}
    *before, last = problem["loc"] or (None,)
    for part in before:
        if _holds(values, part):
            keys.append(part)
            values = values[part]
    if last is not None and (problem["type"] == "missing" or _holds(values, last)):
        keys.append(last)
    return tuple(keys)


def _holds(values: Any, key: str | int) -> bool:
    return key in values if isinstance(values, dict) else isinstance(values, list) and isinstance(key, int)


def _what(problem: Any, loc: tuple[Any, ...], schema: type[BaseModel]) -> str:
    got = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key{near(str(loc[-1]), keys_at(loc[:-1], schema), schema)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if isinstance(got, (dict, list)) else f"got {short(got)}: {message}"


def short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"an integer of {value.bit_length():,} bits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def keys_at(loc: Sequence[Any], schema: type[BaseModel]) -> list[str]:
    """The keys of the section that a path leads to; [] where it leads to none."""
    section = section_at(loc, schema)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def section_at(loc: Sequence[Any], section: type[BaseModel]) -> type[BaseModel] | None:
    """The section class that a path of keys leads to."""
    for part in loc:
        if str(part).isdigit():
            continue
        field = section.model_fields.get(str(part))
        if field is None:
            return None
        inner = _models_in(field.annotation)
        if not inner:
            return None
        section = inner[0]
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _line(raw: Any, loc: tuple[Any, ...]) -> int:
    """Line of a path in the YAML, or of its nearest parent that the file holds."""
    line, node = 1, raw
    for part in loc:
        position = getattr(node, "lc", None)
        if position is None:
            break
        try:
            if isinstance(node, dict):
                part = next(key for key in node if str(key) == part)  # an integer, say
                line = position.key(part)[0] + 1
            else:
                line = position.item(part)[0] + 1
            node = node[part]
        except (KeyError, IndexError, TypeError, StopIteration):
            break
    return line


def near(key: str, known: list[str], schema: type[BaseModel]) -> str:
    """What was meant: an abbreviation (lr), a misspelling, the key of another section, or a word of a key."""
    paths = list(_paths(schema))
    near = (
        [name for name in known if _initials(name) == key]
        or [path for path in paths if _initials(path.rpartition(".")[2]) == key]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or [path for path in paths if path.rpartition(".")[2] == key]
        or [name for name in known if key in name.split("_")]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    )
    meant = " or ".join(map(repr, near[:MOST_NEAR]))
    return f"; did you mean {meant}?" if near else f"; known keys: {', '.join(known)}"


def _initials(key: str) -> str:
    """lr of learning_rate; "" of a single word."""
    words = [word for word in key.split("_") if word]
    return "".join(word[0] for word in words) if len(words) > 1 else ""


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of all keys, those of lists under the position 0."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        yield path
        for inner in _models_in(field.annotation):
            at = ".0" if get_origin(field.annotation) is tuple else ""
            yield from _paths(inner, f"{path}{at}.")
