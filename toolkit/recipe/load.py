"""From a recipe's name to a frozen `Recipe`: read strictly, every problem reported together with file, line and path.

YAML 1.2; unknown and duplicate keys are errors.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import ValidationError

from toolkit.errors import UserError
from toolkit.recipe import yaml_file
from toolkit.recipe.problems import explain
from toolkit.recipe.schema import Recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads recipes/NAME.yaml or a path, applies `--set` overrides ("dotted.path=value"), validates strictly.

    Raises UserError with every problem found: no such recipe, YAML syntax, unknown or misspelt keys, wrong types.
    """
    file = _find(name_or_path)
    raw = yaml_file.read(file)
    problems = [problem for override in overrides if (problem := yaml_file.override(raw, override, Recipe))]
    if problems:
        raise UserError(*problems)
    values = yaml_file.plain(raw, file)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        of_file = yaml_file.plain(yaml_file.read(file), file)
        raise UserError(*explain(error, Recipe, raw, values, file, overrides, of_file)) from None
    recipe._file = file
    return recipe


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.stem.strip("."):
            raise UserError(
                f"recipe file {name_or_path}: {path.stem!r} would be the folder of its runs; rename it"
            )
        if path.is_file():
            return path.absolute()
        near = difflib.get_close_matches(path.stem, names(), n=1, cutoff=0.6)
        hint = f"; did you mean the shipped recipe, --recipe {near[0]}?" if near else ""
        raise UserError(f"no recipe file {path.absolute()}{hint}")
    path = RECIPES / f"{name_or_path}.yaml"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"no recipe {name_or_path!r}: {hint}Known recipes: {', '.join(names())}; a path ends in .yaml"
    )
