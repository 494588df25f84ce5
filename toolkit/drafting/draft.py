"""A recipe in the making: values by dotted path, each with where it comes from, and what the user sets above them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from toolkit.errors import UserError
from toolkit.recipe import stages, yaml_file
from toolkit.recipe.fields import Section, declared, key_of
from toolkit.recipe.schema import Recipe

GIVEN = "given with --set"
NO_STAGE = "no such stage here"


class Choice(NamedTuple):
    """A value and its source, as it stands beside the value."""

    value: Any
    why: str


@dataclass(frozen=True)
class Draft:
    """`choices` by dotted path; what they leave out takes the schema's default and its reason."""

    file: Path
    choices: Mapping[str, Choice]
    overrides: tuple[str, ...] = ()

    def with_choices(self, more: Mapping[str, Choice]) -> Draft:
        return Draft(self.file, {**self.choices, **more}, self.overrides)

    def given(self, path: str) -> Any:
        """What --set says of a value; None where it does not."""
        found: Any = self._raw()
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found if self.is_given(path) else None

    def is_given(self, path: str) -> bool:
        return path in self._overridden()

    def recipe(self) -> Recipe:
        """Raises UserError for what --set makes of it."""
        raw = self._raw()
        try:
            recipe = Recipe.model_validate(raw)
        except ValidationError as error:
            raise UserError(
                *(
                    f"--set {'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
                    for problem in error.errors()
                )
            ) from None
        recipe._file = self.file
        return recipe

    def text(self, header: str) -> str:
        """The recipe with every key, and beside each where its value comes from."""
        recipe = self.recipe()
        values = recipe.model_dump(mode="json", by_alias=True)
        for stage in recipe.stages():  # of a set only what is written: its other keys hardly ever are
            written = recipe.section(stage.name).model_dump(mode="json", by_alias=True, exclude_unset=True)
            values[stage.name]["datasets"] = written["datasets"]
        body = yaml_file.dump(values, self._comments(recipe))
        return f"{header}\n{re.sub(r'^(?=[a-z]+:$)', chr(10), body, flags=re.MULTILINE)}"

    def _raw(self) -> dict[str, Any]:
        raw: dict[str, Any] = {}
        for path, choice in self.choices.items():
            *sections, key = path.split(".")
            node = raw
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = choice.value
        problems = [problem for one in self.overrides if (problem := yaml_file.override(raw, one, Recipe))]
        if problems:
            raise UserError(*problems)
        return raw

    def _overridden(self) -> list[str]:
        return [one.partition("=")[0] for one in self.overrides]

    def _comments(self, recipe: Recipe) -> dict[tuple[str | int, ...], str]:
        why = {path: key.default for path, field in declared(Recipe) if (key := key_of(field))}
        why |= {path: choice.why for path, choice in self.choices.items()}
        why |= {name: NO_STAGE for name in stages.names() if getattr(recipe, name, None) is None}
        why |= dict.fromkeys(self._overridden(), GIVEN)
        return {tuple(path.split(".")): why[path] for path, _, _ in recipe.leaves() if why.get(path)}


def required(section: type[Section]) -> set[str]:
    """The keys without a default."""
    return {field.alias or name for name, field in section.model_fields.items() if field.is_required()}
