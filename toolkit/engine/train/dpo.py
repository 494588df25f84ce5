"""Direct preference optimisation; the reference is the policy that the stage starts from."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

from toolkit.engine.base import model, token_rows
from toolkit.engine.base.micro_batches import MicroBatches
from toolkit.engine.data import preparation
from toolkit.engine.reference import proof
from toolkit.engine.reference.first_step import FirstStep
from toolkit.engine.reference.kinds import PAIRS
from toolkit.engine.reference.precompute import REF_ADAPTER
from toolkit.engine.train import attempt, shared_prompts, stage
from toolkit.engine.train.across_ranks import AcrossRanks
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.recipe.schema import Dpo
from toolkit.records.run_report import RunReport
from toolkit.training import trainer_args
from toolkit.training.job import Job


class TokenisedDPOTrainer(AcrossRanks, DurableCheckpoints, OutOfMemoryRecovery, DPOTrainer):
    """TRL's trainer on rows that masking.py has tokenised and cut; TRL itself accepts only text.

    Runs a micro-batch in pieces where it does not fit. `reference` is what the report says of the reference pass,
    `shared_prompts` what it says of prompts that are run once (None: the recipe does not ask for it).
    """

    reference: dict[str, Any]
    reference_kind = PAIRS
    shared_prompts: dict[str, Any] | None = None

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def run(job: Job) -> RunReport:
    """Trains the DPO stage; see `stage.run`. Stops before the first step unless the reference is the policy."""
    return stage.run(job, build)


def build(job: Job, loaded: model.LoadedModel, prepared: preparation.Prepared) -> DPOTrainer:
    """The trainer, ready to train, its reference computed and proved."""
    recipe, console = job.recipe, job.console
    assert isinstance(job.section, Dpo)
    with model.keep_float32(loaded.model):
        trainer = TokenisedDPOTrainer(
            model=loaded.model,
            ref_model=None,
            args=DPOConfig(
                **trainer_args.dpo(recipe, job.plan.settings, job.run.checkpoints, job.stage.name)
            ),
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            processing_class=loaded.tokenizer,
            recovery=attempt.recovery(job),
            processes=job.processes,
            micro_batches=MicroBatches(job.plan.settings.tokens_per_micro_batch),
        )
    token_rows.copy(trainer.model, proof.POLICY_ADAPTER, REF_ADAPTER)
    if job.section.share_prompts:
        trainer.shared_prompts = shared_prompts.establish(trainer, job.section.max_length, console)
    source = str(job.start.folder) if job.start else recipe.model.path
    trainer.reference = proof.establish(trainer, source, job.section.precompute_ref_batch_size, console)
    trainer.add_callback(FirstStep(trainer))  # reads the log of step 1, whoever writes it
    return trainer
