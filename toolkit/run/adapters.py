"""Saved adapters by name or path: found, and held against the base and the LoRA of a recipe. Needs no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import command
from toolkit.errors import UserError
from toolkit.memory import terms
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections import FUSED
from toolkit.recipe.stages import BASE
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.run.sealing import MARK

CONFIG = "adapter_config.json"
MOST_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_LAYER = re.compile(r"\.layers\.(\d+)\..*\.(\w+)\.lora_([AB])\.weight$")
_QUANTISED = re.compile(r"(-unsloth)?-bnb-4bit$")  # a copy of the same base, quantised beforehand


class Tensor(NamedTuple):
    """What the head of a safetensors file says of a tensor."""

    dtype: str
    shape: list[int]


def find(recipe: Recipe, run: RunDir, name: str) -> Path | None:
    """The folder of an adapter; None for the base.

    `name` is base, a variant of the recipe's stages, or a path: of an adapter, a run's folder or one of its
    checkpoints. Raises UserError when there is none, or one of the recipe's runs is not to be used.
    """
    if name == BASE:
        return None
    if stages.is_variant(name):
        trained = run.of(name)
        if trained.finished_with() is None:
            raise UserError(f"no finished adapter in {trained.adapter}; {_there_are(recipe, trained)}")
        trained.check_adapter()
        return trained.adapter
    path = Path(name)
    folder = next((one for one in (path / "adapter", path) if (one / CONFIG).is_file()), None)
    if folder is None or (folder != path and not (folder / MARK).is_file()):
        raise UserError(_unknown(run, name, path))
    for other in run.finished():
        if folder.samefile(run.of(other).adapter):
            run.of(other).check_adapter()
    return folder


def check_fits(recipe: Recipe, folder: Path) -> None:
    """Raises UserError unless the folder holds a LoRA, in safetensors, for the recipe's base; any rank will do."""
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a {config.get('peft_type')} adapter; only LoRA ones are used")
    if config.get("task_type") == "SEQ_CLS":
        raise UserError(
            f"{folder} holds a reward model: it gives scores, and models that answer are asked for"
        )
    theirs, ours = str(config.get("base_model_name_or_path")), recipe.model.path
    if not _same_base(theirs, recipe.locate(ours)):
        raise UserError(
            f"{folder} was trained on {theirs}, the base of recipe {recipe.name} is {ours}: use it with a recipe "
            f"of its own base, or, if that is the same model by another name, with `--set model.path={theirs}`"
        )
    if wrong := _wrong_shape(recipe, tensors(folder / WEIGHTS)):
        raise UserError(f"{folder} does not fit {ours}: {wrong}; it was trained on another base")


def other_lora(recipe: Recipe, folder: Path) -> list[str]:
    """What of the recipe's `lora` is not as in the adapter: trained on, it would be another model from the start."""
    config, lora = read_config(folder), recipe.lora
    pairs = {
        "r": (config.get("r"), lora.r),
        "lora_alpha": (config.get("lora_alpha"), lora.lora_alpha),
        "use_rslora": (bool(config.get("use_rslora")), lora.use_rslora),
        "target_modules": (_parts(config.get("target_modules") or ()), _parts(lora.target_modules)),
    }
    return [
        f"lora.{key}: {theirs!r} there, {ours!r} in the recipe"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


def _parts(modules: Iterable[str]) -> list[str]:
    """Names of linears, those for which a family has one in their place."""
    return sorted({part for name in modules for part in FUSED.get(name, (name,))})


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} lacks {WEIGHTS}; weights in pickle files are not loaded")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its head alone. Raises UserError for a damaged one."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(min(length, MOST_HEADER_BYTES)))
        entries = {name: entry for name, entry in head.items() if name != "__metadata__"}
        found = {name: Tensor(entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
        raise UserError(f"{file} is damaged: it does not begin as a safetensors file does") from None
    if size < end:
        raise UserError(f"{file} is damaged: it was cut off, {size:,} of {end:,} bytes are there")
    return found


def _there_are(recipe: Recipe, run: RunDir) -> str:
    """What to take instead, or the command that makes it."""
    label, others = stages.label_of(run.name), run.finished()
    if label and others:
        return f"there are {', '.join(others)}"
    return f"run `{command.propose(run.stage, recipe.name, *(['--name', label] if label else []))}` first"


def _unknown(run: RunDir, name: str, path: Path) -> str:
    if path.is_dir():
        inside = sorted(str(found.parent) for found in path.glob(f"**/{CONFIG}"))[:6]
        return "holds no adapter" + (f"; there are {', '.join(inside)}" if inside else f" ({CONFIG})")
    known = list(dict.fromkeys([BASE, *stages.names(), *run.finished()]))
    beside = [str(found) for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*known, *beside], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"no such model, and no such folder as {path.absolute()}; {hint}Known: {', '.join(known)}, or the path of an "
        "adapter"
    )


def _same_base(one: str, other: str) -> bool:
    """Whether two paths or Hub ids name one base, however they spell it; a quantised copy of it is it too."""
    if os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other):
        return True
    return _base_name(one) == _base_name(other)


def _base_name(path: str) -> str:
    return _QUANTISED.sub("", os.path.basename(os.path.abspath(path)).lower())


def _wrong_shape(recipe: Recipe, found: dict[str, Tensor]) -> str | None:
    """What of the LoRA's shapes differs from the base's."""
    base, widths = recipe.model.architecture, terms.targets(recipe.model.architecture)
    for layer, module, side, shape in _lora_shapes(found):
        if layer >= base.num_hidden_layers:
            return f"it has a layer {layer}, the base has {base.num_hidden_layers} layers"
        expected = widths.get(module, (None, None))[side == "B"]
        got = shape[0 if side == "B" else 1]
        if expected is not None and got != expected:
            return f"{module} has {got} features {'out' if side == 'B' else 'in'}, the base {expected}"
    return None


def _lora_shapes(found: dict[str, Tensor]) -> Iterator[tuple[int, str, str, list[int]]]:
    for name, tensor in found.items():
        if match := _LAYER.search(name):
            yield int(match[1]), match[2], match[3], tensor.shape
