"""A reward model: one score for a conversation, larger for the reply that was chosen."""

from __future__ import annotations

from typing import Any

from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from toolkit.engine.base import model
from toolkit.engine.base.micro_batches import MicroBatches
from toolkit.engine.data import preparation
from toolkit.engine.train import attempt, stage
from toolkit.engine.train.across_ranks import AcrossRanks
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.recipe.schema import Reward
from toolkit.records.run_report import RunReport
from toolkit.training import trainer_args
from toolkit.training.job import Job


class WholeSequences(DataCollatorForPreference):
    """Collates the pairs of masking.py: TRL wants each sequence whole, prompt and reply."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        whole = [
            {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
            for row in examples
        ]
        batch: dict[str, Any] = super().torch_call(whole)
        return batch


class TokenisedRewardTrainer(AcrossRanks, DurableCheckpoints, OutOfMemoryRecovery, RewardTrainer):
    """TRL's trainer, or Unsloth's on a GPU, on rows that masking.py has tokenised and cut. Runs a micro-batch in pieces
    where it does not fit."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = preparation.IDS["pair"]


def run(job: Job) -> RunReport:
    """Trains the reward stage; see `stage.run`."""
    return stage.run(job, build)


def build(job: Job, loaded: model.LoadedModel, prepared: preparation.Prepared) -> RewardTrainer:
    """The trainer, ready to train."""
    assert isinstance(job.section, Reward)
    with model.keep_float32(loaded.model):
        return TokenisedRewardTrainer(
            model=loaded.model,
            args=RewardConfig(
                **trainer_args.reward(job.recipe, job.plan.settings, job.run.checkpoints, job.stage.name)
            ),
            data_collator=WholeSequences(loaded.tokenizer.pad_token_id),
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            processing_class=loaded.tokenizer,
            recovery=attempt.recovery(job),
            processes=job.processes,
            micro_batches=MicroBatches(job.plan.settings.tokens_per_micro_batch),
        )
