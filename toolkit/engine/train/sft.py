"""Supervised fine-tuning on assistant tokens, end-of-turn token included."""

from __future__ import annotations

import torch
from datasets import Dataset
from rich.console import Console
from trl import SFTConfig, SFTTrainer, pack_dataset

from toolkit.engine.base import model
from toolkit.engine.base.micro_batches import MicroBatches
from toolkit.engine.data import preparation
from toolkit.engine.train import attempt, stage
from toolkit.engine.train.across_ranks import AcrossRanks
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.recipe.schema import Sft
from toolkit.records.run_report import RunReport
from toolkit.training import trainer_args
from toolkit.training.job import Job


class RecoveringSFTTrainer(AcrossRanks, DurableCheckpoints, OutOfMemoryRecovery, SFTTrainer):
    """TRL's trainer, or Unsloth's on a GPU, that runs a micro-batch in pieces where it does not fit."""


def run(job: Job) -> RunReport:
    """Trains the SFT stage; see `stage.run`."""
    return stage.run(job, build)


def build(job: Job, loaded: model.LoadedModel, prepared: preparation.Prepared) -> SFTTrainer:
    """The trainer, ready to train."""
    assert isinstance(job.section, Sft)
    train = prepared.train
    if job.section.packing:
        train = packed(train, job.section.max_length, job.console)
    with model.keep_float32(loaded.model):
        return RecoveringSFTTrainer(
            model=loaded.model,
            args=SFTConfig(
                **trainer_args.sft(job.recipe, job.plan.settings, job.run.checkpoints, job.stage.name)
            ),
            train_dataset=train,
            eval_dataset=prepared.eval,
            processing_class=loaded.tokenizer,
            recovery=attempt.recovery(job),
            processes=job.processes,
            micro_batches=MicroBatches(job.plan.settings.tokens_per_micro_batch),
        )


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
