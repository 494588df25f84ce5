"""docs/recipe.md, made from the schema: `python -m toolkit.recipe.document > docs/recipe.md`, or `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from toolkit.recipe import stages
from toolkit.recipe.fields import Role, Section, declared, key_of, sections_in
from toolkit.recipe.schema import Recipe, Sft, StageSection

INTRODUCTION = """\
# The recipe, key by key

<!-- Made from toolkit/recipe/ by `make docs`; a test holds the two together. -->

One YAML holds everything that shapes a run. An unknown key stops it, with its line and the nearest known one. The
model, its template and the data have to be written; every other key has a default, so that a short recipe works and
goes on working when a key is added. The shipped recipes write every key, with its source or reason beside it, and
`recipe.resolved.yaml` of a run spells out every value that held, with `# default` beside what was not written.

This is a recipe, and `python run_sft.py --recipe mine.yaml` runs it without a GPU:

```yaml
"""

EXAMPLE = """\
description: The embedded model learns to answer, then to answer courteously

model:
  path: recipes/tiny/base # a Hub id, or a folder beside this file or in the working directory
  architecture: # from the model's config.json
    num_hidden_layers: 4
    hidden_size: 192
    intermediate_size: 384
    num_attention_heads: 6
    num_key_value_heads: 2
    vocab_size: 1792

template:
  file: recipes/templates/llama3.jinja
  end_of_turn: <|eot_id|>
  pad_token: <|finetune_right_pad_id|>

sft:
  datasets:
    - path: recipes/tiny/sft.jsonl

dpo:
  datasets:
    - path: recipes/tiny/dpo.jsonl
"""

OF_ITS_KEYS = "that of its keys"
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}
LIMITS = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))

WHAT_ROLES_ARE = {
    Role.WEIGHTS: "shapes the weights: a run is not continued, nor called finished, under another value",
    Role.ROWS: "as `weights`, and prepared rows are prepared again",
    Role.WATCHING: "changes what is checked, seen or kept of a run; may change at any time",
    Role.MACHINE: "where the same run is computed and how its memory is spent; an unfinished run keeps the settings "
    "that were chosen for it",
    Role.EXPORT: "changes what leaves a finished run",
}


def markdown() -> str:
    """The document: an example, the roles, and a table of keys for every section."""
    roles = [f"| `{role}` | {what} |" for role, what in WHAT_ROLES_ARE.items()]
    lines = ["Every key has a role:", "", "| role | what another value does |", "|---|---|", *roles]
    for title, section, keys in _sections():
        lines += ["", f"## {title}", "", " ".join((section.__doc__ or "").split()), ""]
        lines += ["| key | type | default | role | what it does |", "|---|---|---|---|---|"]
        lines += [_row(section.model_fields[key].alias or key, section.model_fields[key]) for key in keys]
    return f"{INTRODUCTION}{EXAMPLE}```\n\n" + "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[Section], list[str]]]:
    """(title, section, its keys) of each section once; what all stages have comes before the first of them."""
    shared = [key for key in StageSection.model_fields if key not in Sft.__annotations__]
    yield "The recipe", Recipe, list(Recipe.model_fields)
    seen: set[type[Section]] = set()
    for path, field in declared(Recipe):
        for section in sections_in(field.annotation):
            is_stage = issubclass(section, StageSection)
            if is_stage and StageSection not in seen:
                yield " and ".join(f"`{name}`" for name in stages.names()), StageSection, shared
            if section not in seen:
                keys = [key for key in section.model_fields if not (is_stage and key in shared)]
                yield f"`{path.removeprefix('sft.')}`", section, keys
            seen |= {section, StageSection} if is_stage else {section}


def _row(name: str, field: FieldInfo) -> str:
    key, default = key_of(field), "**required**"
    if key is None:
        [section] = sections_in(field.annotation)
        does = (section.__doc__ or "").split(". ")[0].rstrip(".")
        default = default if field.is_required() else OF_ITS_KEYS
        cells = [f"`{name}`", "section", default, OF_ITS_KEYS, does[:1].lower() + does[1:]]
    else:
        default = default if field.is_required() else f"`{_value(field.default)}`<br>{key.default}"
        cells = [f"`{name}`", _type(field.annotation, field.metadata), default, f"`{key.role}`", key.does]
    return f"| {' | '.join(cells)} |"


def _value(value: Any) -> str:
    """As one writes it in YAML."""
    if isinstance(value, Section):
        return f"{{{', '.join(f'{name}: {_value(item)}' for name, item in value.model_dump(by_alias=True).items())}}}"
    return json.dumps(list(value) if isinstance(value, tuple) else value).strip('"')


def _type(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """What may be written, in words: the type, its limits, or the values there are."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0], [limit for part in parts[1:] for limit in getattr(part, "metadata", [part])])
    if origin in (Union, UnionType):
        return ", or ".join(_type(part) for part in parts)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is tuple:
        least = any(isinstance(limit, MinLen) for limit in limits)
        return f"list of {_type(parts[0])}{', at least one' if least else ''}"
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    words = [
        f"{sign} {getattr(limit, name):,}"
        for limit in limits
        for kind, name, sign in LIMITS
        if type(limit) is kind
    ]
    return f"{NAMES[annotation]} {' and '.join(words)}".rstrip()


if __name__ == "__main__":
    print(markdown(), end="")
