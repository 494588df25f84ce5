"""Which linears of a model get an adapter: the recipe's names, held against the model's own."""

from __future__ import annotations

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


def targets(recipe: Recipe, model: Any) -> tuple[list[str], list[str]]:
    """The names that PEFT is to look for, and what is to be said of them.

    Where the model has one linear in the place of several, that one is meant. Raises UserError for a name that it does
    not have either way: PEFT would leave it out without a word as long as another one is found.
    """
    own, asked = names(model), recipe.lora.target_modules
    meant = {name: name if name in own else FUSED_IN.get(name, name) for name in asked}
    if absent := [name for name in asked if meant[name] not in own]:
        raise UserError(
            f"lora.target_modules: {recipe.model.path} has no {', '.join(absent)}; its linears are {', '.join(own)}"
        )
    fused = {
        one: [name for name in asked if meant[name] == one != name] for one in dict.fromkeys(meant.values())
    }
    notes = [
        f"{recipe.model.path} has one linear, {one}, for {', '.join(parts)}: the adapter is on that one"
        for one, parts in fused.items()
        if parts
    ]
    return list(fused), notes
