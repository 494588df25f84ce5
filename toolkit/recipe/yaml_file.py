"""Recipe files as text: YAML with line numbers, `--set` overrides, and errors that say where and what."""

from __future__ import annotations

import difflib
import io
import itertools
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from toolkit.errors import UserError

MAX_CHARACTERS = 2**20
MAX_VALUES = 100_000  # of a recipe: an alias of aliases multiplies what it names
MAX_DEPTH = 200  # of brackets
MOST_NEAR = 3  # keys that may have been meant
MOST_SHOWN = 80  # characters of a value that is wrong


def dump(values: dict[str, Any], defaults: Container[tuple[str | int, ...]] = ()) -> str:
    """The mapping as YAML text, with `# default` beside the values at the paths of `defaults`."""
    stream = io.StringIO()
    _yaml().dump(_commented(values, defaults), stream)
    return stream.getvalue()


def _commented(
    node: Any, defaults: Container[tuple[str | int, ...]], path: tuple[str | int, ...] = ()
) -> Any:
    if isinstance(node, list):
        return [_commented(item, defaults, (*path, at)) for at, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    commented = CommentedMap()
    for key, value in node.items():
        commented[key] = _commented(value, defaults, (*path, key))
        if (*path, key) in defaults:
            commented.yaml_add_eol_comment("default", key, column=0)
    return commented


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.representer.add_representer(type(None), _null)
    return yaml


def _null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def read(file: Path) -> Any:
    """The mapping of a recipe file, with its line numbers. Raises UserError for a file that holds none."""
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{file}: longer than {MAX_CHARACTERS:,} characters; a recipe takes a few thousand")
    try:
        raw = _parsed(text)
    except _Unreadable as unreadable:
        raise UserError(f"{file}{unreadable.where}: not valid YAML: {unreadable}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys, got {type(raw).__name__}")
    return raw


class _Unreadable(Exception):
    """What is wrong with a YAML text, and `where`, as `:line:column`."""

    def __init__(self, what: str, where: str = ""):
        super().__init__(what)
        self.where = where


def _parsed(text: str) -> Any:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > MAX_DEPTH:  # the parser's time grows with its square: 7 s for 5,000
            raise _Unreadable("nested too deep")
    try:
        return _yaml().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _Unreadable(what, where) from None
    except RecursionError:
        raise _Unreadable("nested too deep") from None
    except (
        Exception
    ) as error:  # a date of month 13, an integer of 5,000 digits: whatever its types cannot hold
        raise _Unreadable((str(error).splitlines() or [type(error).__name__])[0]) from None


def plain(raw: Any, file: Path) -> Any:
    """The YAML tree without the round-trip types that carry its line numbers, aliases written out.

    Raises UserError, naming the file, where that takes more than MAX_VALUES values, as an alias of itself does.
    """
    num_values = itertools.count(1)

    def copy(node: Any) -> Any:
        if next(num_values) > MAX_VALUES:
            raise UserError(
                f"{file}: holds more than {MAX_VALUES:,} values once its aliases are written out, or an alias of "
                "itself: a recipe has a few hundred; write them in full"
            )
        if isinstance(node, dict):
            return {str(key): copy(value) for key, value in node.items()}
        if isinstance(node, list):
            return [copy(value) for value in node]
        for kind in (bool, int, float, str):
            if isinstance(node, kind):
                return kind(node)
        return node

    try:
        return copy(raw)
    except RecursionError:
        raise UserError(f"{file}: nested too deep, or an alias of itself: write its values in full") from None


def override(raw: Any, text: str, schema: type[BaseModel]) -> str | None:
    """Applies one `--set dotted.path=value` to the raw mapping; returns what is wrong with it, if anything.

    A section that the file leaves out to its defaults is made.
    """
    dotted, equals, value_text = text.partition("=")
    if not equals or not dotted:
        return f"--set {text}: expected dotted.path=value, for example --set dpo.beta=0.2"
    try:
        value = _parsed(value_text)
    except _Unreadable as unreadable:
        return f"--set {text}: the value is not valid YAML: {unreadable}"
    node, keys = raw, dotted.split(".")
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the recipe"
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or len(key) > 9 or int(key) >= len(node):
                return f"--set {text}: {here} is a list of {len(node)}; {key!r} is none of its positions"
            key = int(key)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            return f"--set {text}: {here} is {_short(node)}, which has no key {key!r}"
        elif not last and key not in node:
            known = _keys_at(keys[:depth], schema)
            if key not in known or not _section_at(keys[: depth + 1], schema):
                return f"--set {text}: {here} has no key {key!r}{_near(key, known, schema)}"
            node[key] = {}
        if last:
            node[key] = value
        else:
            node = node[key]
    return None


def _near(key: str, known: list[str], schema: type[BaseModel]) -> str:
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


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    raw: Any,
    values: Any,
    file: Path,
    overrides: tuple[str, ...],
) -> list[str]:
    """One line a problem, in the order of the file; the missing keys of a section share theirs.

    `values` is what was validated, `raw` the same with line numbers. A problem that the file alone does not have is
    one of the overrides that touch it.
    """
    of_file = _problems(schema, plain(read(file), file)) if overrides else set()
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
        if overrides and not any((loc, what) in of_file for what in whats):
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
        return f"unknown key{_near(str(loc[-1]), _keys_at(loc[:-1], schema), schema)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if isinstance(got, (dict, list)) else f"got {_short(got)}: {message}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"an integer of {value.bit_length():,} bits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _keys_at(loc: Sequence[Any], schema: type[BaseModel]) -> list[str]:
    """The keys of the section that a path leads to; [] where it leads to none."""
    section = _section_at(loc, schema)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _section_at(loc: Sequence[Any], section: type[BaseModel]) -> type[BaseModel] | None:
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
