"""The recipe's fields: one YAML says everything about a run, and is the only home of its values.

`load.py` reads it. Field names are the upstream ones wherever upstream has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from toolkit.errors import UserError
from toolkit.recipe import stages, yaml_file
from toolkit.recipe.stages import Stage

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


# Fields that change what is seen, kept or exported of a run, not its weights.
WATCHING = {
    "logging_steps",
    "report_to",
    "eval_steps",
    "per_device_eval_batch_size",
    "base_16bit",
    "save_steps",
    "save_minutes",
    "save_within_seconds",
    "save_total_limit",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Architecture(Section):
    """The six numbers a plan needs, so that it can be made offline; checked against the model's config at load.

    `head_dim` is hidden_size / num_attention_heads where null (Gemma's is not).
    """

    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt
    head_dim: PositiveInt | None = None
    tie_word_embeddings: bool = False


class Model(Section):
    """The base model. `path` is a Hub id or a folder, looked up beside the recipe first.

    `base_16bit` is the same model in 16 bits, for `run_export.py` to merge onto, where `path` is a pre-quantised
    copy; null: `path` itself.
    """

    path: str
    revision: str | None
    base_16bit: str | None
    load_in_4bit: bool
    trust_remote_code: bool = False
    architecture: Architecture


class Template(Section):
    """How messages become text. `file` is a Jinja file beside the recipe, or "tokenizer" for the model's own."""

    file: str
    end_of_turn: str
    pad_token: str


class Lora(Section):
    r: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_rslora: bool
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class TopK(Section):
    column: str
    rows: PositiveInt


class Source(Section):
    """One set of rows: a Hub id, or local files (.jsonl, .json, .csv, .parquet; a glob; a saved dataset's folder).

    `rows_schema` names the schema where the columns alone do not tell it (`schema` in the YAML). Of several sets
    `rows` takes that many rows of this one into the mix, or `weight` its share of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    path: str
    name: str | None = None
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None
    rows_schema: Annotated[str | None, Field(alias="schema")] = None
    filter: str | None = None
    top_k: TopK | None = None
    rows: PositiveInt | None = None
    weight: PositiveFloat | None = None


class StageSection(Section):
    """What every stage has: which rows, how they are cut, and how the optimizer walks over them.

    `group_by_length` puts rows of like length into a batch: less padding, in an order fixed by the seed. A checkpoint
    is saved every `save_steps` steps, and `save_minutes` minutes after the last one; one that takes longer than
    `save_within_seconds` is warned of.
    """

    datasets: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)]
    eval_datasets: Annotated[tuple[Source, ...], Field(strict=False)]
    eval_rows: Annotated[int, Field(ge=0)]
    deduplicate: bool
    max_rows: PositiveInt | None
    max_dropped_fraction: Fraction
    system_turn: Literal["keep", "merge"]
    max_length: Annotated[int, Field(ge=8)]
    overlong: Literal["cut", "drop"]
    group_by_length: bool
    num_train_epochs: PositiveFloat
    max_steps: PositiveInt | None
    effective_batch_size: PositiveInt
    per_device_eval_batch_size: PositiveInt
    learning_rate: PositiveFloat
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: NonNegativeFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: NonNegativeFloat
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
    logging_steps: PositiveInt
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)]
    eval_steps: PositiveInt | None
    save_steps: PositiveInt
    save_minutes: PositiveFloat | None
    save_within_seconds: PositiveFloat
    save_total_limit: PositiveInt

    @model_validator(mode="after")
    def _held_out_rows_are_named_once(self) -> StageSection:
        if self.eval_steps and not (self.eval_datasets or self.eval_rows):
            raise ValueError(
                "eval_steps is set but eval_datasets is empty and eval_rows is 0: nothing to evaluate"
            )
        if self.eval_datasets and self.eval_rows:
            raise ValueError("eval_datasets and eval_rows are both set: take one source of held-out rows")
        return self

    @model_validator(mode="after")
    def _all_sets_of_a_mix_have_a_weight_or_none(self) -> StageSection:
        weights = [source.weight is not None for source in self.datasets]
        if any(weights) and not (all(weights) and len(weights) > 1):
            raise ValueError("datasets: a weight is a share of a mix, so give one to each of several sets")
        if any(source.weight is not None for source in self.eval_datasets):
            raise ValueError("eval_datasets: held-out sets are not mixed, so they take no weight")
        return self


class Sft(StageSection):
    """`packing` fills each sequence of `max_length` with several rows (GPU only; the CPU backend pads)."""

    packing: bool


class Dpo(StageSection):
    beta: PositiveFloat
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    precompute_ref_batch_size: PositiveInt


class Compare(Section):
    """Prompts answered side by side, and `questions`: rows {messages, answer} that measure correct answers.

    `mix_lengths` puts prompts of unlike length into one batch, padded; without it a batch holds one length only.
    """

    prompts: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    questions: str | None
    system: str | None
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    mix_lengths: bool
    do_sample: bool
    temperature: PositiveFloat
    top_p: Annotated[float, Field(gt=0, le=1)]


class Memory(Section):
    """How the card's memory is spent; `auto` is worked out by `memory.plan` and can be pinned by copying it here.

    `alloc_conf` goes to the allocator variable that the installed torch reads, before torch is imported.
    `budget_gib` is what a run may allocate. `recompute_layers` decoder layers recompute their activations.
    `per_device_train_batch_size` rows (pairs in DPO) go through the model at once; accumulation follows from the
    stage's `effective_batch_size`. `loss_chunk_gib` bounds the logits that exist at one time.
    """

    alloc_conf: str
    budget_gib: Literal["auto"] | PositiveFloat
    recompute_layers: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)]
    per_device_train_batch_size: Literal["auto"] | PositiveInt
    loss_chunk_gib: Literal["auto"] | PositiveFloat


class Recipe(Section):
    """Everything that shapes a run. `gpu` names the card it is made for; null runs without one."""

    description: str
    gpu: str | None
    seed: Annotated[int, Field(ge=0)]
    model: Model
    template: Template
    lora: Lora
    memory: Memory
    sft: Sft | None
    dpo: Dpo | None
    compare: Compare

    _file: Path = PrivateAttr(default=Path("recipe.yaml"))

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        if not self.stages():
            raise ValueError(f"none of {', '.join(stages.names())} is set: a recipe needs at least one stage")
        micro, layers = self.memory.per_device_train_batch_size, self.memory.recompute_layers
        for stage in self.stages():
            effective = self.section(stage.name).effective_batch_size
            if micro != "auto" and effective % micro:
                raise ValueError(
                    f"{stage.name}.effective_batch_size {effective} is not a multiple of "
                    f"memory.per_device_train_batch_size {micro}: accumulation must be whole"
                )
        if isinstance(layers, int) and layers > self.model.architecture.num_hidden_layers:
            raise ValueError(f"memory.recompute_layers {layers} is more than the model's layers")
        return self

    @property
    def name(self) -> str:
        return self._file.stem

    def stages(self) -> list[Stage]:
        """The stages that the recipe has, in the order in which they run."""
        return [stage for stage in stages.STAGES.values() if getattr(self, stage.name, None) is not None]

    def section(self, stage: str) -> StageSection:
        """The section of a stage. Raises UserError when the recipe has none."""
        section: StageSection | None = getattr(self, stage)
        if section is None:
            others = " or ".join(
                f"`python run_{other.name}.py --recipe {self.name}`" for other in self.stages()
            )
            raise UserError(
                f"recipe {self.name} has no {stage} stage (its {stage} is null); run {others} instead, or write a "
                f"{stage} section into {self._file}"
            )
        return section

    def starts_from(self, stage: str) -> str | None:
        """The stage whose adapter this one continues; None when it starts from the model itself."""
        return next((name for name in stages.of(stage).continues if getattr(self, name) is not None), None)

    def locate(self, path: str) -> str:
        """A path of the recipe as this process can open it; a Hub id is returned as it is.

        Looked up beside the recipe file first, then in the working directory; globs are allowed.
        """
        for folder in (self._file.parent, Path.cwd()):
            if any(folder.glob(path)) if any(c in path for c in "*?[") else (folder / path).exists():
                return str((folder / path).absolute())
        return path

    def to_yaml(self) -> str:
        """The recipe with every value spelled out, loadable again."""
        return yaml_file.dump(self.model_dump(mode="json", by_alias=True))

    def trajectory(self, stage: str) -> dict[str, Any]:
        """The values that shape the weights of a stage, by dotted path; those of the stages before it too."""
        sections = {"seed", "model", "template", "lora"} | {one.name for one in stages.lineage(stage)}
        values = _flatten(self.model_dump(mode="json", by_alias=True, include=sections))
        return {path: value for path, value in values.items() if path.split(".")[-1] not in WATCHING}


def _flatten(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {
        k: v for key, value in node.items() for k, v in _flatten(value, f"{path}.{key}".lstrip(".")).items()
    }
