"""What every field of a recipe says of itself: its role, what it does, and why its default is what it is.

The role is read by the trajectory, the row cache and the evaluation; the texts make docs/recipe.md. A field
without them does not load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Role(StrEnum):
    """What another value of a field changes."""

    WEIGHTS = "weights"
    ROWS = "rows"
    WATCHING = "watching"
    MACHINE = "machine"
    EXPORT = "export"


# The roles that make a run another run.
TRAJECTORY = (Role.WEIGHTS, Role.ROWS)

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Key:
    """`default` says where the default comes from; a field without a default has none to explain.

    `decides` is what a change means to an evaluation of a model that was trained before it: another "model", which
    is refused; another "split", refused where held-out rows were split off the training rows; other "held_out" rows
    alone, which is allowed. Any other change of the trajectory is allowed and said.
    """

    role: Role
    does: str
    default: str = ""
    decides: Literal["model", "split", "held_out"] | None = None


shapes_weights = partial(Key, Role.WEIGHTS)
shapes_rows = partial(Key, Role.ROWS)
only_watches = partial(Key, Role.WATCHING)
on_machine = partial(Key, Role.MACHINE)
only_exports = partial(Key, Role.EXPORT)


class Section(BaseModel):
    """A mapping of the recipe. A class whose field lacks its `Key` raises TypeError when it is defined."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            key = key_of(field)
            if key is None and not _is_section(field.annotation):
                raise TypeError(
                    f"{cls.__name__}.{name} has no role: declare it beside the type, for example "
                    'Annotated[int, shapes_weights("what it does")]'
                )
            if key and not field.is_required() and not key.default:
                raise TypeError(f"{cls.__name__}.{name} has a default that is not explained: give `default=`")

    def leaves(self) -> Iterator[tuple[str, Key, Any]]:
        """(dotted path, key, value ready for JSON) of every field; a list or an absent section is one value."""
        values = self.model_dump(mode="json", by_alias=True)
        for name, field in type(self).model_fields.items():
            alias, inner, key = field.alias or name, getattr(self, name), key_of(field)
            if isinstance(inner, Section):
                yield from ((f"{alias}.{path}", *leaf) for path, *leaf in inner.leaves())
            elif key:
                yield alias, key, values[alias]

    def unwritten(self) -> set[Path]:
        """Where a value stands by default: the path of each such value, through mappings and lists."""
        found: set[Path] = set()
        for name, field in type(self).model_fields.items():
            alias, value = field.alias or name, getattr(self, name)
            if isinstance(value, Section):
                found |= {(alias, *path) for path in value.unwritten()}
            elif name not in self.model_fields_set:
                found.add((alias,))
            elif isinstance(value, tuple):
                inner = [(at, item.unwritten()) for at, item in enumerate(value) if isinstance(item, Section)]
                found |= {(alias, at, *path) for at, paths in inner for path in paths}
        return found


def key_of(field: FieldInfo) -> Key | None:
    """What the field declares of itself; None for a section that is always there, whose fields do."""
    return next((item for item in field.metadata if isinstance(item, Key)), None)


def declared(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of everything a section can hold, sections before what is in them; `[]` for a list's."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        yield path, field
        for inner in sections_in(field.annotation):
            yield from declared(inner, f"{path}[]." if get_origin(field.annotation) is tuple else f"{path}.")


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes that a field's type names."""
    if _is_section(annotation):
        return [annotation]
    return [inner for part in getattr(annotation, "__args__", ()) for inner in sections_in(part)]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
