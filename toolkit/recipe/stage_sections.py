"""The sections of the stages: which rows, how they are cut, and how the optimizer walks over them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from toolkit.recipe.dpo_losses import LOSSES, DpoLoss
from toolkit.recipe.fields import Section, only_watches, shapes_rows, shapes_weights
from toolkit.recipe.sections import Fraction, Int, NonNegativeFloat, PositiveFloat, PositiveInt


def _listed(value: Any) -> Any:
    """One name stands for a list of it."""
    return [value] if isinstance(value, str) else value


class TopK(Section):
    """The rows with the largest values of a column."""

    column: Annotated[str, shapes_rows("a column of numbers")]
    rows: Annotated[PositiveInt, shapes_rows("how many rows")]


class Source(Section):
    """One set of rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    path: Annotated[
        str,
        shapes_rows(
            "a Hub id, or local files (.jsonl, .json, .csv, .parquet; a glob; a saved dataset's folder), "
            "looked up beside the recipe first"
        ),
    ]
    name: Annotated[str | None, shapes_rows("configuration of a Hub set", "its only one")] = None
    data_dir: Annotated[str | None, shapes_rows("folder of a Hub set", "all of it")] = None
    split: Annotated[str, shapes_rows("split of a Hub or saved set", "the usual name")] = "train"
    revision: Annotated[
        str | None, shapes_rows("commit, tag or branch on the Hub", "the repository's main")
    ] = None
    rows_schema: Annotated[
        str | None,
        Field(alias="schema"),
        shapes_rows("the rows' layout, where the columns alone do not tell it", "recognised by the columns"),
    ] = None
    filter: Annotated[
        str | None,
        shapes_rows('conditions on columns, e.g. `score >= 4 and lang == "en"`', "every row"),
    ] = None
    top_k: Annotated[
        TopK | None, shapes_rows("only the rows with the largest values of a column", "every row")
    ] = None
    rows: Annotated[PositiveInt | None, shapes_rows("take that many rows of this set", "all")] = None
    weight: Annotated[
        PositiveFloat | None,
        shapes_rows("share of this set in the mix; one for each of several sets, or none", "all rows"),
    ] = None


class Divergence(Section):
    """When a loss has left its range."""

    factor: Annotated[
        float,
        Field(gt=1),
        only_watches(
            "a loss of more than so many times the first step's is out of range",
            "guessing among 128,000 tokens is some 8 times the loss a base model starts with",
        ),
    ] = 3.0
    patience: Annotated[
        PositiveInt,
        only_watches("lines of the log in a row that are out of range", "one hard batch is no divergence"),
    ] = 3


class StageSection(Section):
    """What every stage has."""

    datasets: Annotated[
        tuple[Source, ...],
        Field(min_length=1, strict=False),
        shapes_rows("the sets that are trained on", decides="split"),
    ]
    eval_datasets: Annotated[
        tuple[Source, ...],
        Field(strict=False),
        shapes_rows("sets that are held out", "none", "held_out"),
    ] = ()
    eval_rows: Annotated[
        Int,
        Field(ge=0),
        shapes_rows(
            "rows of `datasets` that are held out, by prompt", "none; 500 tell a loss to 0.02", "split"
        ),
    ] = 0
    deduplicate: Annotated[
        bool,
        shapes_rows(
            "use a row that repeats once", "else it counts twice, or is held out and trained", "split"
        ),
    ] = True
    max_rows: Annotated[PositiveInt | None, shapes_rows("rows that are used at most", "all", "split")] = None
    max_dropped_fraction: Annotated[
        Fraction,
        only_watches(
            "stop before training when a larger share of the rows is unusable",
            "more than a tenth means a wrong schema or length: stop and look",
        ),
    ] = 0.1
    system_turn: Annotated[
        Literal["keep", "merge"],
        shapes_rows(
            "keep system turns, or merge them into the first user turn", "most templates have one", "split"
        ),
    ] = "keep"
    max_length: Annotated[Int, Field(ge=8), shapes_rows("tokens of a row at most", "Unsloth's notebooks")] = (
        2048
    )
    group_by_length: Annotated[
        bool,
        shapes_weights("rows of like length share a batch, in an order fixed by the seed", "less padding"),
    ] = True
    num_train_epochs: Annotated[
        PositiveFloat, shapes_weights("passes over the rows", "Unsloth's guide: 1 to 3")
    ] = 1.0
    max_steps: Annotated[
        PositiveInt | None,
        shapes_weights("optimizer steps; wins over num_train_epochs", "the epochs decide"),
    ] = None
    effective_batch_size: Annotated[
        PositiveInt,
        shapes_weights(
            "rows (pairs in DPO, completions in RL) of an optimizer step; accumulation follows",
            "alignment-handbook on one GPU: 4 x 4",
        ),
    ] = 16
    per_device_eval_batch_size: Annotated[
        PositiveInt, only_watches("held-out rows that are evaluated at once", "takes the least memory")
    ] = 1
    learning_rate: Annotated[PositiveFloat, shapes_weights("peak of the schedule")]
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "constant", "constant_with_warmup"],
        shapes_weights("course of the learning rate after the warm-up", "Unsloth's notebooks"),
    ] = "linear"
    warmup_steps: Annotated[
        NonNegativeFloat,
        shapes_weights("steps until the peak; below 1 a share of all steps", "alignment-handbook: a tenth"),
    ] = 0.1
    weight_decay: Annotated[NonNegativeFloat, shapes_weights("of AdamW", "transformers' default")] = 0.0
    max_grad_norm: Annotated[
        NonNegativeFloat, shapes_weights("a longer gradient is cut to this norm", "transformers' default")
    ] = 1.0
    optim: Annotated[
        Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"],
        shapes_weights(
            "the optimizer; on a CPU always AdamW in 32 bits", "Unsloth's notebooks: a quarter of its memory"
        ),
    ] = "adamw_8bit"
    logging_steps: Annotated[
        PositiveInt, only_watches("steps between two lines of the log", "alignment-handbook's for DPO")
    ] = 10
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...],
        Field(strict=False),
        BeforeValidator(_listed),
        only_watches("trackers beside metrics.jsonl; need requirements-optional.txt", "none"),
    ] = ()
    eval_steps: Annotated[
        PositiveInt | None, only_watches("steps between two evaluations", "once, at the end")
    ] = None
    save_steps: Annotated[
        PositiveInt, only_watches("steps between two checkpoints", "alignment-handbook")
    ] = 100
    save_minutes: Annotated[
        PositiveFloat | None,
        only_watches(
            "a checkpoint also this many minutes after the last one", "bounds what a lost pod costs"
        ),
    ] = 20.0
    save_within_seconds: Annotated[
        PositiveFloat,
        only_watches("warn of a checkpoint that takes longer", "half of the 10 s that `docker stop` leaves"),
    ] = 5.0
    save_total_limit: Annotated[
        PositiveInt,
        only_watches("checkpoints that are kept", "the last one, and the one before should it be damaged"),
    ] = 2

    @property
    def rows_per_step(self) -> int:
        """Rows of the data set that an optimizer step takes."""
        return self.effective_batch_size

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


class AnswersSection(StageSection):
    """What every stage has whose rows hold the answers that are trained."""

    overlong: Annotated[
        Literal["cut", "drop"],
        shapes_rows("cut a longer row, or drop it", "a cut answer has no end token and teaches to run on"),
    ] = "drop"
    divergence: Annotated[
        Divergence | None,
        only_watches(
            "stop a run whose loss stays out of its range; null: only at one that is no number",
            "no run comes back from there",
        ),
    ] = Divergence()


class Sft(AnswersSection):
    """Supervised fine-tuning: rows are conversations."""

    learning_rate: Annotated[
        PositiveFloat, shapes_weights("peak of the schedule", "Unsloth's notebooks and guide for LoRA")
    ] = 2e-4
    packing: Annotated[
        bool,
        shapes_weights(
            "fill each sequence of max_length with several rows (GPU only)", "like lengths already pad little"
        ),
    ] = False


class Reward(AnswersSection):
    """A reward model: rows are pairs, and the chosen reply is to get the larger score."""

    learning_rate: Annotated[
        PositiveFloat, shapes_weights("peak of the schedule", "TRL's default for reward models")
    ] = 1e-4
    center_rewards_coefficient: Annotated[
        NonNegativeFloat,
        shapes_weights(
            "weight of a term that pulls the scores of a pair to a mean of 0",
            "Eisenstein et al. 2023, equation 2; the value is TRL's",
        ),
    ] = 0.01


class Kto(AnswersSection):
    """Kahneman-Tversky optimisation: rows are replies, each with a label, good or bad."""

    effective_batch_size: Annotated[
        Int,
        Field(ge=2),
        shapes_weights(
            "rows of an optimizer step; the KL term is their mean, so 2 at least",
            "as in the other stages",
        ),
    ] = 16
    per_device_eval_batch_size: Annotated[
        Int,
        Field(ge=2),
        only_watches(
            "held-out rows that are evaluated at once; their KL term is their mean", "as in training"
        ),
    ] = 16
    learning_rate: Annotated[
        PositiveFloat,
        shapes_weights("peak of the schedule", "Unsloth's for DPO; TRL's default for KTO is a fifth of it"),
    ] = 5e-6
    beta: Annotated[
        PositiveFloat,
        shapes_weights("how strongly the policy is held to its reference", "TRL's default"),
    ] = 0.1
    desirable_weight: Annotated[
        PositiveFloat | Literal["auto"],
        shapes_weights(
            "weight of the loss of good replies; auto: both classes count the same in all, the rarer one is raised",
            "Ethayarajh et al. 2024, equation 8 as TRL reads it, at its lower end",
        ),
    ] = "auto"
    undesirable_weight: Annotated[
        PositiveFloat | Literal["auto"],
        shapes_weights("the same of bad replies", "as desirable_weight"),
    ] = "auto"
    precompute_ref_batch_size: Annotated[
        PositiveInt,
        shapes_weights(
            "rows of the reference pass at once, at most; memory.tokens_per_micro_batch bounds them too",
            "only short rows come to so many",
        ),
    ] = 16


class Dpo(AnswersSection):
    """Direct preference optimisation: rows are pairs."""

    learning_rate: Annotated[
        PositiveFloat, shapes_weights("peak of the schedule", "Unsloth's notebook and guide for DPO")
    ] = 5e-6
    beta: Annotated[
        PositiveFloat,
        shapes_weights(
            "how strongly the policy is held to its reference", "Rafailov et al. 2023, appendix B"
        ),
    ] = 0.1
    loss_type: Annotated[
        DpoLoss,
        shapes_weights("which loss; they differ in what `beta` means", "Rafailov et al. 2023, equation 7"),
    ] = "sigmoid"
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=0.5),
        shapes_weights(
            "share of the pairs taken to be the wrong way round; `robust` alone has it",
            "labels are taken at their word",
        ),
    ] = 0.0
    share_prompts: Annotated[
        bool,
        shapes_weights(
            "run the prompt of a pair once for both replies, where the model allows it: the same loss, fewer tokens",
            "checked against padded pairs before the first step",
        ),
    ] = True
    precompute_ref_batch_size: Annotated[
        PositiveInt,
        shapes_weights(
            "pairs of the reference pass at once, at most; memory.tokens_per_micro_batch bounds them too",
            "only short pairs come to so many",
        ),
    ] = 16

    @model_validator(mode="after")
    def _label_smoothing_has_a_loss(self) -> Dpo:
        if self.label_smoothing and not LOSSES[self.loss_type].has_label_smoothing:
            have = " or ".join(name for name, loss in LOSSES.items() if loss.has_label_smoothing)
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} is set and loss_type {self.loss_type} has none: take "
                f"loss_type {have}, or label_smoothing 0"
            )
        return self
