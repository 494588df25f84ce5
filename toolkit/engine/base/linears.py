"""Which linears of a model get an adapter: the recipe's names, held against the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections import FUSED

FUSED_IN = {part: name for name, parts in FUSED.items() for part in parts}


def names(model: Any) -> list[str]:
    """The linears of the decoder layers, by the last part of their names."""
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted({name.rpartition(".")[2] for name in linears if ".layers." in f".{name}"})


def meant(asked: Iterable[str], own: Sequence[str], path: str) -> dict[str, list[str]]:
    """The model's own name -> which of the names that were asked for it stands for.

    Where the model has one linear in the place of several, that one is meant. Raises UserError for a name that it does
    not have either way: PEFT would leave it out without a word as long as another one is found.
    """
    found: dict[str, list[str]] = {}
    for name in asked:
        found.setdefault(name if name in own else FUSED_IN.get(name, name), []).append(name)
    if absent := [name for one, names in found.items() if one not in own for name in names]:
        raise UserError(
            f"lora.target_modules: {path} has no {', '.join(absent)}; its linears are {', '.join(own)}"
        )
    return found


def targets(recipe: Recipe, model: Any) -> tuple[list[str], list[str]]:
    """The names that PEFT is to look for, and what is to be said of them. Raises UserError as `meant` does."""
    found = meant(recipe.lora.target_modules, names(model), recipe.model.path)
    notes = [
        f"{recipe.model.path} has one linear, {one}, for {', '.join(parts)}: the adapter is on that one"
        for one, parts in found.items()
        if parts != [one]
    ]
    return list(found), notes
