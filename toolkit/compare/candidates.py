"""Which models are compared: names and paths -> saved adapters that fit the recipe's base. Needs no torch."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import UserError
from toolkit.memory import terms
from toolkit.recipe import stages
from toolkit.recipe.schema import Architecture, Recipe
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK

BASE = "base"
MOST_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_LAYER = re.compile(r"\.layers\.(\d+)\..*\.(\w+)\.lora_([AB])\.weight$")
_QUANTISED = re.compile(r"(-unsloth)?-bnb-4bit$")  # a copy of the same base, quantised beforehand


def choose(recipe: Recipe, run: RunDir, names: str | None) -> dict[str, Path | None]:
    """Label -> folder of the adapter, None for the base; in the order asked for, each once.

    `names` is base, sft, dpo and paths, separated by commas; None is the base and every finished stage. A path is
    an adapter, a stage's folder or one of its checkpoints. Raises UserError with everything that is wrong: unknown
    names, stages that are not finished or continued another adapter than stands there, adapters of another base.
    """
    if names is None:
        finished = [stage for stage in stages.answering() if run.of(stage).finished_with() is not None]
        if not finished:
            asked_of = [stage.name for stage in recipe.stages() if stage.answers]
            adapters = (str(run.of(name).adapter) for name in asked_of)
            commands = (f"`python run_{name}.py --recipe {recipe.name}`" for name in asked_of)
            raise UserError(
                f"nothing to compare: no finished adapter in {' or '.join(adapters)}; "
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
            folder = None if name == BASE else _folder(recipe, run, name)
            if folder is not None:
                _check_made(run, folder)
                check_fits(recipe, folder)
            folders[name] = folder
        except UserError as error:
            problems += [f"--models {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return _labelled(folders)


class Reference(NamedTuple):
    """`folder` is None for the base."""

    folder: Path | None


def reference(recipe: Recipe, run: RunDir) -> Reference | None:
    """The model that implicit rewards are measured against: what the last stage with a reference started from.

    None when the recipe has no such stage, or the adapter is not there.
    """
    stage = next((stage for stage in reversed(recipe.stages()) if stage.has_reference), None)
    if stage is None:
        return None
    started_from = recipe.starts_from(stage.name)
    if started_from is None:
        return Reference(None)
    before = run.of(started_from)
    return Reference(before.adapter) if before.finished_with() is not None else None


def check_fits(recipe: Recipe, folder: Path) -> None:
    """Raises UserError unless the folder holds a LoRA, in safetensors, for the recipe's base; any rank will do."""
    config = _read_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a {config.get('peft_type')} adapter; only LoRA ones are compared")
    if config.get("task_type") == "SEQ_CLS":
        raise UserError(
            f"{folder} holds a reward model: it gives scores, and only models that answer are compared"
        )
    theirs, ours = str(config.get("base_model_name_or_path")), recipe.model.path
    if _base_name(theirs) != _base_name(ours):
        raise UserError(
            f"{folder} was trained on {theirs}, the base of recipe {recipe.name} is {ours}: compare it with a recipe "
            f"of its own base, or, if that is the same model by another name, with `--set model.path={theirs}`"
        )
    if wrong := _wrong_shape(folder / "adapter_model.safetensors", recipe.model.architecture):
        raise UserError(f"{folder} does not fit {ours}: {wrong}; it was trained on another base")


def _folder(recipe: Recipe, run: RunDir, name: str) -> Path:
    if name in stages.answering():
        trained = run.of(name)
        if trained.finished_with() is None:
            raise UserError(
                f"no finished adapter in {trained.adapter}; run `python run_{name}.py --recipe {recipe.name}` first"
            )
        return trained.adapter
    path = Path(name)
    if (path / "adapter" / MARK).is_file():
        return path / "adapter"
    if (path / "adapter_config.json").is_file():
        return path
    raise UserError(_unknown(name, path))


def _check_made(run: RunDir, folder: Path) -> None:
    """Raises UserError for a stage's adapter, however it was named, that is not to be used."""
    for stage in stages.answering():
        trained = run.of(stage)
        if trained.adapter.exists() and folder.samefile(trained.adapter):
            trained.check_adapter()


def _unknown(name: str, path: Path) -> str:
    if name in stages.names():
        return "its model gives scores, and only models that answer are compared"
    if path.is_dir():
        inside = sorted(str(found.parent) for found in path.glob("**/adapter_config.json"))[:6]
        return "holds no adapter" + (
            f"; there are {', '.join(inside)}" if inside else " (adapter_config.json)"
        )
    beside = [str(found) for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [BASE, *stages.answering(), *beside], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    known = ", ".join((BASE, *stages.answering()))
    return f"no such model and no such folder; {hint}Known: {known}, or the path of an adapter"


def _labelled(folders: dict[str, Path | None]) -> dict[str, Path | None]:
    """Names as short as they can be and stay different: the end of the path, longer where two would be alike."""
    parts = {
        name: [name] if name in (BASE, *stages.answering()) else _telling_parts(folder)
        for name, folder in folders.items()
        if folder is not None or name == BASE
    }
    taken: dict[str, str] = {}
    for name in sorted(
        parts, key=lambda name: name not in (BASE, *stages.answering())
    ):  # the plain names stay theirs
        candidates = ["-".join(parts[name][-count:]) for count in range(1, len(parts[name]) + 1)]
        candidates += [f"{candidates[-1]}-{number}" for number in range(2, len(parts) + 2)]
        taken[name] = next(label for label in map(_plain, candidates) if label not in taken.values())
    return {taken[name]: folder for name, folder in folders.items()}


def _telling_parts(folder: Path | None) -> list[str]:
    assert folder is not None
    return [part for part in folder.absolute().parts[1:] if part not in ("adapter", "checkpoints", "..")]


def _plain(label: str) -> str:
    """PEFT makes a module name of it: no dot, and not its own prefix."""
    return re.sub(r"[^\w-]+", "-", label, flags=re.ASCII).replace("lora_", "lora-").strip("-_") or "model"


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} lacks adapter_model.safetensors; weights in pickle files are not loaded")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _base_name(path: str) -> str:
    return _QUANTISED.sub("", Path(path).name.lower())


def _wrong_shape(file: Path, base: Architecture) -> str | None:
    """What of the LoRA's shapes differs from the base's, from the head of the file alone."""
    widths = terms.linears(base)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            shapes = json.loads(stream.read(min(length, MOST_HEADER_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        return f"{file.name} cannot be read ({error})"
    if not isinstance(shapes, dict):
        return f"{file.name} cannot be read (its header is no JSON object)"
    for name, entry in shapes.items():
        if match := _LAYER.search(name):
            layer, module, side = int(match[1]), match[2], match[3]
            if layer >= base.num_hidden_layers:
                return f"it has a layer {layer}, the base has {base.num_hidden_layers} layers"
            expected = widths.get(module, (None, None))[side == "B"]
            got = entry["shape"][0 if side == "B" else 1]
            if expected is not None and got != expected:
                return f"{module} has {got} features {'out' if side == 'B' else 'in'}, the base {expected}"
    return None
