"""The template of a recipe before anything heavy is loaded: whether it can be read, and which tokens end a turn."""

from __future__ import annotations

from pathlib import Path

from toolkit.data.template import ChatTemplate, read_template
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.records.record import read_object


def problems(recipe: Recipe) -> list[str]:
    """What is wrong with the template's file and tokens, as far as the files on this machine tell."""
    found: list[str] = []
    if recipe.template.file != "tokenizer":
        try:
            ChatTemplate(
                read_template(recipe.locate(recipe.template.file), recipe.looked_in(recipe.template.file))
            )
        except UserError as error:
            found += [f"template.file: {problem}" for problem in error.problems]
    config = read_object(Path(recipe.locate(recipe.model.path)) / "tokenizer_config.json")
    eos = config.get("eos_token")
    if problem := pad_problem(recipe, eos.get("content") if isinstance(eos, dict) else eos):
        found.append(problem)
    return found


def pad_problem(recipe: Recipe, eos: str | None) -> str | None:
    """That padding would hide an end token."""
    pad = recipe.template.pad_token
    if pad not in (recipe.template.end_of_turn, eos):
        return None
    return (
        f"template.pad_token {pad!r} is also an end token: padding is masked out of the loss, so the model would never "
        "learn to stop; name another token"
    )
