"""Supervised fine-tuning on assistant tokens, end-of-turn token included."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from trl import SFTConfig, SFTTrainer, pack_dataset

from toolkit import trainer_args
from toolkit.engine import data, model, oom, stage
from toolkit.engine.checkpoints import DurableCheckpoints
from toolkit.engine.pieces import OutOfMemoryRecovery
from toolkit.memory import Plan
from toolkit.recipe import Recipe, Sft
from toolkit.rundir import RunDir


class RecoveringSFTTrainer(DurableCheckpoints, OutOfMemoryRecovery, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, or Unsloth's on a GPU, that runs a micro-batch in pieces where it does not fit."""


def run(recipe: Recipe, plan: Plan, run: RunDir, console: Console, fresh: bool = False) -> dict[str, Any]:
    """Trains the SFT stage; see `stage.run`."""

    stage_recipe = recipe.stage("sft")
    assert isinstance(stage_recipe, Sft)

    def build(loaded: model.Loaded, prepared: data.Prepared, run: RunDir, console: Console) -> SFTTrainer:
        train = (
            packed(prepared.train, stage_recipe.max_length, console)
            if stage_recipe.packing
            else prepared.train
        )
        with model.keep_float32(loaded.model):
            return RecoveringSFTTrainer(
                model=loaded.model,
                args=SFTConfig(**trainer_args.sft(recipe, plan.settings, run.checkpoints)),
                train_dataset=train,
                eval_dataset=prepared.eval,
                processing_class=loaded.tokenizer,
                recovery=oom.Recovery(run.path / oom.EVENTS, console),
            )

    return stage.run(recipe, "sft", plan, run, console, build, fresh)


def packed(rows: Dataset, max_length: int, console: Console) -> Dataset:
    """Several rows in one sequence of `max_length` tokens, where the backend keeps them apart.

    Rows are never split: best-fit decreasing, with their lengths in `seq_lengths`. The CPU backend would let them
    attend to each other, so there they stay as they are.
    """
    if not torch.cuda.is_available():
        console.print("[yellow]packing is on in the recipe and needs a GPU: rows are padded here[/]")
        return rows
    sequences = pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, strategy="bfd")
    console.print(
        f"[dim]{len(rows)} rows packed into {len(sequences)} sequences of up to {max_length} tokens[/]"
    )
    return sequences.add_column("length", [sum(lengths) for lengths in sequences["seq_lengths"]])
