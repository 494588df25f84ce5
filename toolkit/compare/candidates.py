"""Which models are compared: names and paths -> saved adapters that fit the recipe's base. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from toolkit import command
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import BASE
from toolkit.run import adapters, start
from toolkit.run.rundir import RunDir

NO_FOLDERS: dict[str, Path | None] = {}


def choose(recipe: Recipe, run: RunDir, names: str | None) -> dict[str, Path | None]:
    """Label -> folder of the adapter, None for the base; in the order asked for, each once.

    `names` is base, variants (sft, dpo, dpo-beta02) and paths, separated by commas; None is the base and every finished
    stage, without its variants. Raises UserError with everything that is wrong: unknown names, stages that are not
    finished or continued another adapter than stands there, adapters of another base.
    """
    if names is None:
        finished = [stage for stage in stages.answering() if run.of(stage).finished_with() is not None]
        if not finished:
            asked_of = [stage.name for stage in recipe.stages() if stage.answers]
            absent = (str(run.of(name).adapter) for name in asked_of)
            commands = (f"`{command.propose(name, recipe.name)}`" for name in asked_of)
            raise UserError(
                f"nothing to compare: no finished adapter in {' or '.join(absent)}; "
                f"run {' and '.join(commands)} first"
            )
        names = ",".join((BASE, *finished))
    asked = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not asked:
        raise UserError(
            f"--models {names!r} names no model: take {BASE}, {', '.join(stages.answering())} or paths"
        )
    folders: dict[str, Path | None] = {}
    problems = []
    for name in asked:
        try:
            folders[name] = folder = adapters.find(recipe, run, name)
            if folder is not None:
                adapters.check_fits(recipe, folder)
        except UserError as error:
            problems += [f"--models {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return _labelled(folders)


class Reference(NamedTuple):
    """`folder` is None for the base."""

    folder: Path | None


def reference(
    recipe: Recipe, run: RunDir, folders: Mapping[str, Path | None] = NO_FOLDERS
) -> Reference | None:
    """The model that implicit rewards are measured against: what the last model with a reference started from.

    Where none of `folders` has one it is what the recipe's own last such stage started from. None when the recipe has
    no such stage, or the adapter is not there.
    """
    ours = [
        name for name, folder in folders.items() if stages.is_variant(name) and folder == run.of(name).adapter
    ]
    rewarded = [
        name for name in (*(stage.name for stage in recipe.stages()), *ours) if stages.of(name).has_reference
    ]
    if not rewarded:
        return None
    origin = start.origin(recipe, run.of(rewarded[-1]))
    if origin == BASE:
        return Reference(None)
    folder = run.adapter_of(origin)
    return Reference(folder) if folder.is_dir() else None


def _labelled(folders: dict[str, Path | None]) -> dict[str, Path | None]:
    """Names as short as they can be and stay different: the end of the path, longer where two would be alike."""
    parts = {
        name: [name] if _is_plain(name) else _telling_parts(folder)
        for name, folder in folders.items()
        if folder is not None or name == BASE
    }
    taken: dict[str, str] = {}
    for name in sorted(parts, key=lambda name: not _is_plain(name)):  # the plain names stay theirs
        candidates = ["-".join(parts[name][-count:]) for count in range(1, len(parts[name]) + 1)]
        candidates += [f"{candidates[-1]}-{number}" for number in range(2, len(parts) + 2)]
        taken[name] = next(label for label in map(_plain, candidates) if label not in taken.values())
    return {taken[name]: folder for name, folder in folders.items()}


def _is_plain(name: str) -> bool:
    return name == BASE or stages.is_variant(name)


def _telling_parts(folder: Path | None) -> list[str]:
    assert folder is not None
    return [part for part in folder.absolute().parts[1:] if part not in ("adapter", "checkpoints", "..")]


def _plain(label: str) -> str:
    """PEFT makes a module name of it: no dot, and not its own prefix."""
    return re.sub(r"[^\w-]+", "-", label, flags=re.ASCII).replace("lora_", "lora-").strip("-_") or "model"
