"""Kahneman-Tversky optimisation: replies that are labelled good or bad, against the policy that the stage starts from.

The loss measures a reply's log-ratio to the reference from a common point, the KL term: the mean log-ratio of every
prompt of the batch with the reply of its neighbour. So the batch is that of a whole optimizer step, and one that runs
in pieces takes the term of all of it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from datasets import Dataset, List, Value
from rich.markup import escape
from trl import KTOConfig, KTOTrainer

from toolkit.engine.base import model, oom, token_rows
from toolkit.engine.base.micro_batches import MicroBatches
from toolkit.engine.data import preparation
from toolkit.engine.reference import proof
from toolkit.engine.reference.first_step import FirstStep
from toolkit.engine.reference.kinds import LABELLED
from toolkit.engine.reference.precompute import REF_ADAPTER
from toolkit.engine.train import attempt, stage
from toolkit.engine.train.across_ranks import AcrossRanks
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.engine.train.pieces import ROWS, OutOfMemoryRecovery
from toolkit.recipe.schema import Kto
from toolkit.records.run_report import RunReport
from toolkit.training import trainer_args
from toolkit.training.class_balance import ClassBalance
from toolkit.training.job import Job

KL_IDS = "KL_completion_ids"  # TRL's name for the neighbour's reply


class TokenisedKTOTrainer(AcrossRanks, DurableCheckpoints, OutOfMemoryRecovery, KTOTrainer):
    """TRL's trainer, or Unsloth's on a GPU, on rows that masking.py has tokenised and cut. Runs a batch in pieces where
    it does not fit, each with the KL term of the whole batch.

    `reference` is what the report says of the reference pass, `class_balance` what it says of the classes.
    """

    reference: dict[str, Any]
    reference_kind = LABELLED
    class_balance: dict[str, Any]
    _whole_kl: torch.Tensor | None = None  # of the batch that runs in pieces now

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _in_pieces(self, mode: str, inputs: Any, step: Any) -> Any:
        try:
            return super()._in_pieces(mode, inputs, step)
        finally:
            self._whole_kl = None

    def _run_piece(self, mode: str, inputs: Any, rows: list[Any], *args: Any) -> Any:
        batch = inputs[ROWS].rows
        if len(rows) < len(batch) and self._whole_kl is None:
            self._whole_kl = self._kl_of(mode, batch)
        return super()._run_piece(mode, inputs, rows, *args)

    def _kl_of(self, mode: str, batch: list[Any]) -> torch.Tensor:
        """The mean log-ratio of these prompts with their neighbours' replies, in pieces too; it needs no graph."""
        rows, found = self.micro_batches.ordered(batch), list[torch.Tensor]()
        self.model.train(mode == "train")
        while rows:
            size = self.micro_batches.first(rows, len(batch), self.recovery.split[mode])
            ratios = oom.attempt(partial(self._log_ratios, rows[:size]))
            if not isinstance(ratios, oom.OutOfMemory):
                found.append(ratios)
                rows = rows[size:]
            elif size > 1:
                self._split_smaller(mode, ratios, rows[:size], len(batch))
            else:
                self._give_up(mode, ratios, rows[0])
        return torch.cat(found).mean()

    def _log_ratios(self, rows: list[Any]) -> torch.Tensor:
        inputs = self._prepare_inputs(self.data_collator(rows))
        with self.compute_loss_context_manager():
            policy = super()._compute_kl_logps(self.model, inputs)
        ratios: torch.Tensor = policy - inputs["ref_KL_logps"]
        return ratios

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        """TRL takes the mean of this less `ref_KL_logps`."""
        if self._whole_kl is None:
            return super()._compute_kl_logps(model, batch)
        return self._whole_kl.expand(len(batch["label"]))

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self._whole_kl is not None:
            inputs = inputs | {"ref_KL_logps": torch.zeros_like(inputs["ref_KL_logps"])}
        return super()._compute_loss(model, inputs, return_outputs)


def run(job: Job) -> RunReport:
    """Trains the KTO stage; see `stage.run`. Stops before the first step unless the reference is the policy."""
    return stage.run(job, build)


def build(job: Job, loaded: model.LoadedModel, prepared: preparation.Prepared) -> KTOTrainer:
    """The trainer, ready to train, its reference computed and proved."""
    recipe, section, settings, console = job.recipe, job.section, job.plan.settings, job.console
    assert isinstance(section, Kto)
    balance = _balance(job, section, prepared)
    in_tokens = settings.tokens_per_micro_batch
    with model.keep_float32(loaded.model):
        trainer = TokenisedKTOTrainer(
            model=loaded.model,
            ref_model=None,
            args=KTOConfig(
                **trainer_args.kto(recipe, settings, job.run.checkpoints, job.stage.name),
                desirable_weight=balance.desirable_weight,
                undesirable_weight=balance.undesirable_weight,
            ),
            train_dataset=with_neighbours(prepared.train, section.effective_batch_size),
            eval_dataset=prepared.eval and with_neighbours(prepared.eval, section.per_device_eval_batch_size),
            processing_class=loaded.tokenizer,
            recovery=attempt.recovery(job),
            processes=job.processes,
            micro_batches=MicroBatches(
                in_tokens, rows=None if in_tokens else settings.per_device_train_batch_size
            ),
        )
    trainer.class_balance = asdict(balance)
    token_rows.copy(trainer.model, proof.POLICY_ADAPTER, REF_ADAPTER)
    source = str(job.start.folder) if job.start else recipe.model.path
    trainer.reference = proof.establish(trainer, source, section.precompute_ref_batch_size, console)
    trainer.add_callback(FirstStep(trainer))  # reads the log of step 1, whoever writes it
    return trainer


def _balance(job: Job, section: Kto, prepared: preparation.Prepared) -> ClassBalance:
    labels = prepared.train[preparation.LABEL][:]
    balance = ClassBalance.of(section, sum(labels), len(labels) - sum(labels))
    job.console.print(escape(balance.told()))
    if warning := balance.warning():
        job.console.print(f"[yellow]{escape(warning)}[/]")
    return balance


def with_neighbours(rows: Dataset, batch_size: int) -> Dataset:
    """The rows with `KL_completion_ids`, each the reply of another row of its batch of `batch_size` in their order."""
    prompts, replies = rows["prompt_ids"][:], rows["completion_ids"][:]
    taken = [replies[place] for place in neighbours(prompts, batch_size)]
    return rows.add_column(KL_IDS, taken, feature=List(Value("int32")))


def neighbours(prompts: Sequence[list[int]], batch_size: int) -> list[int]:
    """For each row the one whose reply its prompt is paired with: the row before it, round its batch, as TRL pairs them
    (kto_trainer.py, `add_kl_completion_ids`).

    But not one with the same prompt, of which the pair would be a true one, where the batch has another; and a last
    batch of a single row takes from the one before it.
    """
    found = []
    for place, prompt in enumerate(prompts):
        start = place // batch_size * batch_size
        size = min(batch_size, len(prompts) - start)
        if size == 1 and start:
            found.append(place - 1)
            continue
        round_it = [start + (place - start - back) % size for back in range(1, size + 1)]
        found.append(next((other for other in round_it if prompts[other] != prompt), round_it[0]))
    return found
