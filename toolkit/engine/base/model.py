"""The model: 4-bit base through Unsloth, LoRA in fp32, tokens that end and pad as the recipe says.

The same calls run on a GPU and on Unsloth's CPU backend; nothing here asks which of the two it is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from unsloth import FastLanguageModel

from toolkit import hardware
from toolkit.data.template import ChatTemplate
from toolkit.engine.base import linears, score_head, token_rows, tokens, vram
from toolkit.engine.base.hub import check_base
from toolkit.engine.base.quiet import quiet
from toolkit.errors import UserError
from toolkit.memory import terms
from toolkit.memory.plan import Settings
from toolkit.recipe.schema import Architecture, Recipe
from toolkit.recipe.stages import Task
from toolkit.records.marks import AdapterMark
from toolkit.run import room, sealing
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK

CPU_BLOCK = 32  # bitsandbytes.functional._convert_weight_packed_for_cpu


@dataclass
class LoadedModel:
    """A base model with its tokenizer, the recipe's template, and what was noticed while loading.

    `max_length` is the longest input that it takes: Unsloth cuts a longer one by itself, without an error
    (unsloth/models/llama.py, LlamaModel_fast_forward), so nothing longer may get there. `batch_tokens` is what the card
    has memory for while answers are given: tokens of all rows of a batch, prompts and answers.
    """

    model: Any
    tokenizer: Any
    template: ChatTemplate
    end_of_turn: str
    notes: list[str]
    max_length: int
    batch_tokens: float = math.inf

    @property
    def has_score(self) -> bool:
        """Whether it gives one score instead of answers."""
        return score_head.is_on(self.model)


def load(
    recipe: Recipe,
    max_length: int,
    settings: Settings | None = None,
    all_positions: bool = False,
    task: Task = "causal_lm",
) -> LoadedModel:
    """Base model and tokenizer, for inputs of up to `max_length` tokens, or of all the model's positions.

    Raises UserError when the base cannot be reached or is not what the recipe says.
    """
    path = recipe.locate(recipe.model.path)
    positions = check_base(recipe, path).get("max_position_embeddings")
    _check_widths(recipe)
    options: dict[str, Any] = {}
    if all_positions:
        max_length = max(max_length, positions or 0)
        # else Unsloth moves the embedding to the RAM unless the card could train rows of that length
        options["offload_embedding"] = False
    from_pretrained = FastLanguageModel.from_pretrained if task == "causal_lm" else score_head.from_pretrained
    with quiet():
        model, tokenizer = from_pretrained(
            model_name=path,
            revision=recipe.model.revision,
            max_seq_length=max_length,
            dtype=None,
            load_in_4bit=recipe.model.load_in_4bit,
            trust_remote_code=recipe.model.trust_remote_code,
            use_gradient_checkpointing=_checkpointing(settings),
            use_exact_model_name=True,  # else Unsloth may swap in another repository
            **options,
        )
    _check_architecture(recipe.model.architecture, model.config)
    template = tokens.set_tokens(recipe, model, tokenizer)
    if task == "seq_cls":  # the token that a score is read off is the last one, for every reader
        tokenizer.chat_template = template.ending_with(recipe.template.end_of_turn).source
    notes = tokens.check_known(recipe, model, tokenizer, template)
    if isinstance(positions, int) and max_length > positions:
        notes.append(
            f"max_length {max_length:,} is more than the {positions:,} positions that {recipe.model.path} was trained "
            "on: what lies beyond them it has never seen"
        )
    return LoadedModel(model, tokenizer, template, recipe.template.end_of_turn, notes, max_length)


def attach_lora(loaded: LoadedModel, recipe: Recipe, settings: Settings, max_length: int) -> None:
    """Puts a fresh LoRA on the recipe's modules, trainable weights in fp32; a score's head is trained too."""
    lora = recipe.lora
    target_modules, notes = linears.targets(recipe, loaded.model)
    loaded.notes.extend(notes)
    get_peft_model = score_head.get_peft_model if loaded.has_score else FastLanguageModel.get_peft_model
    with quiet():
        loaded.model = get_peft_model(
            loaded.model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            target_modules=target_modules,
            bias="none",
            random_state=recipe.seed,
            max_seq_length=max_length,
            use_gradient_checkpointing=_checkpointing(settings),
            trainable_token_indices=token_rows.indices(recipe, loaded.model, loaded.tokenizer),
        )
    for parameter in trainable(loaded.model):
        parameter.data = parameter.data.float()
    token_rows.begin(recipe, loaded.model, loaded.tokenizer)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def keep_float32(model: Any) -> Iterator[None]:
    """Holds the trainable weights exactly, in fp32, across the construction of a TRL trainer.

    TRL casts the LoRA weights of a 4-bit model to bf16 there; at a learning rate of 5e-6 most updates would then
    round away.
    """
    kept = [(parameter, parameter.detach().float().clone()) for parameter in trainable(model)]
    yield
    for parameter, value in kept:
        parameter.data = value


def load_adapter(model: Any, folder: Path) -> None:
    """Loads the weights of a saved adapter into the LoRA that `attach_lora` made.

    Raises UserError when it is not what was saved, or its shapes or modules are not those of the recipe.
    """
    sealing.check(folder)
    weights = load_peft_weights(str(folder), device="cpu")
    if score_head.is_on(model):  # that of a model that answers has none
        weights.setdefault(score_head.WEIGHT, score_head.weight_of(model))
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name="default")
    except RuntimeError as error:
        raise UserError(
            f"the adapter in {folder} does not fit the recipe's lora section ({str(error).splitlines()[-1].strip()}): "
            "it was trained with another r, other target_modules or trainable_tokens; train its stage again with "
            "--fresh"
        ) from None
    absent = [key for key in result.missing_keys if "lora_" in key or token_rows.ROWS in key]
    if absent or result.unexpected_keys:
        raise UserError(
            f"the adapter in {folder} does not fit the recipe's lora.target_modules or lora.trainable_tokens: "
            f"{len(absent)} weights absent, {len(result.unexpected_keys)} unknown; train its stage again with --fresh"
        )


def load_trained(recipe: Recipe, adapters: Mapping[str, Path | None]) -> LoadedModel:
    """The base with saved adapters beside each other, to be chosen by `use_adapter`; None is the base itself.

    With room for all the model's positions: prompts may be longer than the rows of training. Raises UserError naming
    each adapter that cannot be loaded, or is not what was saved: that before the base, which can take minutes.
    """
    for saved in filter(None, adapters.values()):
        sealing.check(saved)
    longest = max(recipe.section(stage.name).max_length for stage in recipe.stages())
    loaded, problems = load(recipe, longest, all_positions=True), []
    for name, folder in adapters.items():
        try:
            if folder is not None:
                add_adapter(loaded, name, folder)
        except (RuntimeError, ValueError, OSError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            problems.append(f"{folder} cannot be loaded onto {recipe.model.path}: {said}")
    if problems:
        raise UserError(*problems)
    loaded.batch_tokens = vram.tokens_that_fit(recipe.model.architecture)
    return loaded


def add_adapter(loaded: LoadedModel, name: str, folder: Path) -> None:
    """Loads a saved adapter beside those that are there, under a name for `use_adapter`.

    Raises UserError when it is not what was saved.
    """
    sealing.check(folder)
    with quiet():
        if isinstance(loaded.model, PeftModel):
            loaded.model.load_adapter(str(folder), adapter_name=name)
        else:
            loaded.model = PeftModel.from_pretrained(loaded.model, str(folder), adapter_name=name)


def use_adapter(peft_model: Any, name: str) -> AbstractContextManager[Any]:
    """The model answers as the adapter `name` in the block, or as the "base" without any."""
    if name == "base":
        has_adapters = isinstance(peft_model, PeftModel)
        return peft_model.disable_adapter() if has_adapters else nullcontext()
    peft_model.set_adapter(name)
    return nullcontext()


def save_adapter(loaded: LoadedModel, run: RunDir, mark: AdapterMark) -> None:
    """Writes adapter, tokenizer, template and generation config under a temporary name, then renames.

    `mark` is the completion mark, which is written last, with the hash of every file: a folder without it is
    no adapter. Raises UserError when the disk lacks the room; the run then continues from its last checkpoint.
    """
    check_disk(loaded, run)
    temporary = run.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet():
            loaded.model.save_pretrained(
                temporary, selected_adapters=["default"], save_embedding_layers=False
            )
            loaded.tokenizer.save_pretrained(temporary)
        if not loaded.has_score:
            loaded.model.generation_config.save_pretrained(temporary)
        sealing.seal(temporary, MARK, mark)
        sealing.put_in_place(temporary, run.adapter)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the room it took is wanted


def check_disk(loaded: LoadedModel, run: RunDir, num_checkpoints: int = 0) -> None:
    """Raises UserError when the disk cannot hold the adapter and so many checkpoints beside it."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trainable(loaded.model))
    if problem := room.problem(run, weights / hardware.GIB, num_checkpoints):
        raise UserError(problem)


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _checkpointing(settings: Settings | None) -> str | bool:
    """Unsloth's own checkpointing (layer inputs offloaded to RAM on a GPU) when any layer recomputes."""
    return "unsloth" if settings is not None and settings.recompute_layers else False


def _check_widths(recipe: Recipe) -> None:
    """Raises UserError for linears that bitsandbytes' CPU kernel cannot pack; it would fail at the first answer."""
    if not recipe.model.load_in_4bit or torch.cuda.is_available() or not has_avx512bf16():
        return
    odd = {
        f"{name} {out}"
        for name, (_, out) in terms.linears(recipe.model.architecture).items()
        if out % CPU_BLOCK
    }
    if odd:
        raise UserError(
            f"bitsandbytes takes 4-bit weights on this CPU only where their outputs are a multiple of {CPU_BLOCK}: "
            f"not {', '.join(sorted(odd))}: take --set model.load_in_4bit=false"
        )


def architecture_of(config: Any) -> dict[str, Any]:
    """What a loaded config says of each key of `model.architecture`; of a model that sees too, its text part."""
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in Architecture.model_fields}


def _check_architecture(expected: Architecture, config: Any) -> None:
    found = architecture_of(config)
    problems = [
        f"model.architecture.{key}: the recipe says {value}, the model's config says {found[key]}"
        for key, value in expected.model_dump(exclude_none=True).items()
        if found[key] != value
    ]
    if problems:
        raise UserError(*problems)
