"""Recipe files as text: YAML with line numbers, and `--set` overrides."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from toolkit.errors import UserError
from toolkit.recipe.problems import keys_at, near, section_at, short

MAX_CHARACTERS = 2**20
MAX_VALUES = 100_000  # of a recipe: an alias of aliases multiplies what it names
MAX_DEPTH = 200  # of brackets


def dump(values: dict[str, Any], comments: Mapping[tuple[str | int, ...], str]) -> str:
    """The mapping as YAML text, with `comments` beside the values at their paths."""
    stream = io.StringIO()
    _yaml().dump(_commented(values, comments), stream)
    return stream.getvalue()


def _commented(
    node: Any, comments: Mapping[tuple[str | int, ...], str], path: tuple[str | int, ...] = ()
) -> Any:
    if isinstance(node, list):
        return [_commented(item, comments, (*path, at)) for at, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    commented = CommentedMap()
    for key, value in node.items():
        commented[key] = _commented(value, comments, (*path, key))
        if comment := comments.get((*path, key)):
            commented.yaml_add_eol_comment(comment, key, column=0)
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
            return f"--set {text}: {here} is {short(node)}, which has no key {key!r}"
        elif not last and key not in node:
            known = keys_at(keys[:depth], schema)
            if key not in known or not section_at(keys[: depth + 1], schema):
                return f"--set {text}: {here} has no key {key!r}{near(key, known, schema)}"
            node[key] = {}
        if last:
            node[key] = value
        else:
            node = node[key]
    return None
