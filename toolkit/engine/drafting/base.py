"""The model that a recipe is written for: its config, its tokenizer, and the two matrices over its vocabulary."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import unsloth
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.drafting.draft import Draft
from toolkit.drafting.facts import ModelFacts
from toolkit.engine.base import hub, linears
from toolkit.engine.base.hub import HUB_ERRORS, cached_folder, explain
from toolkit.engine.base.model import architecture_of
from toolkit.engine.base.quiet import quiet
from toolkit.engine.data import examples
from toolkit.engine.export import merge
from toolkit.errors import UserError
from toolkit.recipe.sections import LINEARS

MAPPER = "unsloth/models/mapper.py"


@cache
def _copies() -> Any:
    """Unsloth's table of 16-bit models and their 4-bit copies. By its file: its package asks for triton, a GPU's."""
    spec = importlib.util.spec_from_file_location(
        "mapper", Path(unsloth.__file__).parent / "models" / "mapper.py"
    )
    assert spec and spec.loader
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    return table


@dataclass(frozen=True)
class Matrices:
    """Embedding and head as the weights' files hold them: all of a model that the check of its tokens looks at."""

    embedding: torch.Tensor
    head: torch.Tensor

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.embedding)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.head)


@dataclass(frozen=True)
class Base:
    """`matrices` is None where the weights are not on this machine."""

    facts: ModelFacts
    tokenizer: Any
    matrices: Matrices | None


def look_at(model: str, draft: Draft) -> Base:
    """Raises UserError for a model that is not there, cannot be reached, or is none."""
    revision, trusts = draft.given("model.revision"), bool(draft.given("model.trust_remote_code"))
    facts = _facts(model, revision, trusts)
    if draft.is_given("model.base_16bit"):
        facts = dataclasses.replace(facts, base_16bit=draft.given("model.base_16bit"))
    tokenizer = examples.read_tokenizer(facts.path, revision, trusts)
    return Base(facts, tokenizer, _matrices(_folder(facts.path, revision), facts))


def _facts(model: str, revision: str | None, trusts: bool) -> ModelFacts:
    if Path(model).is_dir():
        return _described(model, _config(model, revision, trusts), "a folder of this machine")
    copy = _copy_of(model)
    if copy and revision is None and not _has_weights(_folder(model, None)):
        try:
            config = _config(copy, None, trusts)
        except UserError:
            pass  # not there either: the model itself, or why not
        else:
            why = f"the NF4 copy that Unsloth made of {model} ({MAPPER}): a quarter to fetch"
            return _described(copy, config, why, model)
    return _described(model, _config(model, revision, trusts), "as asked for")


def _copy_of(model: str) -> str | None:
    """Unsloth's NF4 copy of a 16-bit model; the plain one, for the plan takes every linear to be quantised."""
    table = _copies()
    copy = table.FLOAT_TO_INT_MAPPER.get(model.lower())
    if copy is None or model.lower().endswith("-bnb-4bit"):
        return None
    plain = str(copy).replace("-unsloth-bnb-4bit", "-bnb-4bit")
    return plain if plain.lower() in table.FLOAT_TO_INT_MAPPER else str(copy)


def _made_from(copy: str) -> str | None:
    """The 16-bit weights behind a copy of Unsloth's."""
    table = _copies()
    dynamic = table.FLOAT_TO_INT_MAPPER.get(copy.lower(), copy)
    found: str | None = table.INT_TO_FLOAT_MAPPER.get(dynamic.lower())
    return found


def _described(path: str, config: Any, why: str, base: str | None = None) -> ModelFacts:
    is_quantised = getattr(config, "quantization_config", None) is not None
    why_base = "model.path itself, which has 16 bits"
    if is_quantised:
        base = base or _made_from(path)
        why_base = f"what the NF4 copy was made from ({MAPPER}); exports merge onto it"
    hub.refuse_experts(path, config.get_text_config().to_dict())
    return ModelFacts(
        path, base, is_quantised, architecture_of(config), _linears(path, config), why, why_base
    )


def _linears(path: str, config: Any) -> tuple[str, ...]:
    """Those of a model of this config, none of whose weights is made."""
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise UserError(
            f"{path} is no language model that transformers knows: {type(config).__name__}"
        ) from None
    return tuple(linears.meant(LINEARS, linears.names(model), path))


def _config(path: str, revision: str | None, trusts: bool) -> Any:
    is_folder = Path(path).is_dir()
    if is_folder and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} has no config.json: it is not a model folder")
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusts)
    except (*HUB_ERRORS, ValueError) as error:
        if is_folder or type(error) is ValueError:
            raise UserError(
                f"the config of {path} cannot be read: {' '.join(str(error).split())[:300]}"
            ) from None
        raise UserError(explain(error, "model", path, revision)) from None


def _folder(path: str, revision: str | None) -> Path:
    return Path(path) if Path(path).is_dir() else cached_folder(path, revision)


def _has_weights(folder: Path) -> bool:
    return folder != Path() and any(folder.glob("*.safetensors"))


def _matrices(folder: Path, facts: ModelFacts) -> Matrices | None:
    if not _has_weights(folder):
        return None
    try:
        of = {name: folder / file for file, names in merge.shards(folder).items() for name in names}
    except UserError:  # some of its files
        return None

    def read(end: str) -> torch.Tensor | None:
        name = next((name for name in of if name.endswith(end)), None)
        if name is None or not of[name].is_file():
            return None
        with safe_open(of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor if tensor.is_floating_point() else None

    embedding = read("embed_tokens.weight")
    head = embedding if facts.architecture["tie_word_embeddings"] else read("lm_head.weight")
    return None if embedding is None or head is None else Matrices(embedding, head)
