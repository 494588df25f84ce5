"""The DPO reference: its log-probs computed once before training, and the proof that it is the policy.

TRL copies the adapter that the policy starts from into one called "ref". We read its log-probs for every pair,
attach them to the rows and delete the copy: training then holds one adapter, a checkpoint too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from toolkit.engine.progress import bar
from toolkit.errors import UserError

REF_ADAPTER = "ref"  # TRL's name for it
LOSS_TOLERANCE = 1e-3
# Of the log-ratio of a pair. Equal weights should give exactly 0; one run on the tiny recipe was 0.07 off, in bf16,
# for a reason that was not found. A loss off ln 2 by LOSS_TOLERANCE stops the run whatever the pairs say.
MARGIN_NATS = 0.25


def precompute(trainer: Any, batch_size: int, console: Console) -> int:
    """Adds `ref_chosen_logps` and `ref_rejected_logps` to the trainer's rows and drops the reference adapter.

    Returns how many pairs at once the memory had room for: `batch_size`, or a half of it, a quarter ...
    """
    trainer.train_dataset, batch_size = _with_log_probs(
        trainer, trainer.train_dataset, batch_size, "train", console
    )
    if trainer.eval_dataset is not None:
        trainer.eval_dataset, batch_size = _with_log_probs(
            trainer, trainer.eval_dataset, batch_size, "held-out", console
        )
    trainer.precompute_ref_logps = True
    if REF_ADAPTER in trainer.model.peft_config:
        trainer.model.delete_adapter(REF_ADAPTER)
    return batch_size


def prove(trainer: Any, source: str, batch_size: int, console: Console) -> None:
    """Before the first optimizer step: every reward margin is 0 and the loss is ln 2, or the run stops.

    Looks at the longest pairs, batched as `precompute` batched them, so that equal weights give equal numbers.
    Raises UserError naming the adapter `source` that the reference was taken from.
    """
    rows = trainer.train_dataset
    batch = _batch(trainer, rows, _longest_first(rows)[:batch_size])
    chosen, rejected = _log_probs(trainer, batch)
    ratios = chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]
    apart = (ratios[0] - ratios[1]).abs().max().item()
    # As `train()` will run it: there accelerate wraps the model's forward in this autocast, here nothing has yet.
    with torch.no_grad(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch).item()
    for metrics in trainer._metrics.values():  # this was no step: nothing of it may reach the log
        metrics.clear()
    trainer._total_train_tokens = 0
    margin = trainer.beta * apart
    if not (apart <= MARGIN_NATS and abs(loss - math.log(2)) <= LOSS_TOLERANCE):
        raise UserError(
            f"the DPO reference is not the policy that training starts from: on {len(chosen)} pairs the loss is "
            f"{loss:.4f} (due: ln 2 = {math.log(2):.4f} within {LOSS_TOLERANCE}) and the largest reward margin "
            f"{margin:.4f} (due: 0 within {trainer.beta * MARGIN_NATS:g}). "
            f"The reference was taken from {source}: was it replaced while this run was starting?"
        )
    console.print(
        f"[green]the reference is the policy[/] ({source}): loss {loss:.6f} = ln 2, "
        f"largest margin {margin:.1e} on {len(chosen)} pairs"
    )


def _with_log_probs(
    trainer: Any, rows: Dataset, batch_size: int, title: str, console: Console
) -> tuple[Dataset, int]:
    order, start = _longest_first(rows), 0
    chosen, rejected = [0.0] * len(rows), [0.0] * len(rows)
    with (
        bar(console, f"reference log-probs, {len(rows)} {title} pairs", len(rows)) as advance,
        use_adapter(trainer.model, REF_ADAPTER),
    ):
        while start < len(order):
            log_probs, batch_size = trainer.recovery.halving(
                "reference pass",
                batch_size,
                lambda size, start=start: _log_probs(
                    trainer, _batch(trainer, rows, order[start : start + size])
                ),
                lambda start=start: f"pair {order[start]} of {rows[order[start]]['length']} tokens",
            )
            indices = order[start : start + batch_size]
            for values, column in zip(log_probs, (chosen, rejected), strict=True):
                for index, value in zip(indices, values.tolist(), strict=True):
                    column[index] = value
            start += len(indices)
            advance(len(indices))
    return rows.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected), batch_size


def _longest_first(rows: Dataset) -> list[int]:
    lengths = rows["length"][:]
    return sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)


def _batch(trainer: Any, rows: Dataset, indices: list[int]) -> Any:
    return trainer._prepare_inputs(trainer.data_collator([rows[index] for index in indices]))


def _log_probs(trainer: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(reply | prompt), summed over the reply's tokens: (pairs,) for chosen and for rejected, fp32.

    Through the same fused head that the trainer's loss uses, with the adapter that is active.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        trainer.accelerator.autocast(),
    ):
        output = trainer.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
    chosen, rejected = output.log_probs.float().sum(dim=1).chunk(2)
    return chosen, rejected
