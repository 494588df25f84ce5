"""The process before torch is imported: a machine that will do, and the environment."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from toolkit import env, hardware
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.world import ALONE, World


def prepare(
    recipe: Recipe,
    machine: hardware.Hardware,
    console: Console,
    problems: Sequence[str] = (),
    loss_chunk_gib: float | None = None,
    world: World = ALONE,
) -> None:
    """Checks the machine, sets the process environment and says whose allocator setting holds.

    Raises UserError with whatever is wrong with the machine, and with the `problems` that are known already.
    """
    if found := [
        *hardware.check(recipe.gpu, machine, hardware.torch_build()),
        *hardware.check_limits(),
        *_frozen_tokens(recipe, machine),
        *problems,
    ]:
        raise UserError(*found)
    environment = env.prepare(
        recipe.memory.alloc_conf, machine.card is not None, loss_chunk_gib, recipe.memory.compile, world
    )
    if environment.alloc_source != "recipe":
        console.print(
            f"[yellow]allocator: {escape(environment.alloc_conf)} from the exported {environment.alloc_source} "
            f"wins over the recipe's {escape(recipe.memory.alloc_conf)}[/]"
        )


@contextmanager
def without_collecting() -> Iterator[None]:
    """Imports without the cyclic garbage collector, a fifth of their CPU time: they make a million objects that stay.

    What is there then is never looked at again by later collections, several of which the libraries ask for; some
    40 MB of it are garbage, which half a second of collecting would free.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _frozen_tokens(recipe: Recipe, machine: hardware.Hardware) -> list[str]:
    """That Unsloth's path for GPUs trains no rows of embedding and head, and does not say so."""
    if not recipe.lora.trainable_tokens or machine.gpu is None:
        return []
    return [
        f"lora.trainable_tokens names {', '.join(recipe.lora.trainable_tokens)}: on a GPU Unsloth freezes whatever is "
        "no LoRA matrix when it prepares a model, and these rows would stay as they are. Take a template of tokens "
        "that the model knows (template.file=templates/chatml_text.jinja), and lora.trainable_tokens=[]"
    ]
