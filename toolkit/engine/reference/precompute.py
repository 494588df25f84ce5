"""The pass that computes the reference's log-probs of every pair, before training begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from toolkit.console.screen import bar
from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.reference import cache

REF_ADAPTER = "ref"  # TRL's name for it
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Pass:
    """What a reference pass did. `ends` are the rows of the train set's first and last batch, as they were batched."""

    ends: list[list[int]]
    pairs: int
    reused: int
    keys: list[str]  # where the cache holds them


def precompute(trainer: Any, batch_size: int, console: Console, anew: bool = False) -> Pass:
    """Adds `ref_chosen_logps` and `ref_rejected_logps` to the trainer's rows, from disk where they are kept there.

    Where `batch_size` pairs at once find no room it goes on with a half, a quarter ... With `anew` nothing that is
    kept is used.
    """
    facts = cache.facts_of(trainer.model, REF_ADAPTER, trainer.processing_class.pad_token_id)
    facts["autocast"] = [trainer.args.bf16, trainer.args.fp16]
    done = Pass([], 0, 0, [])
    for side, title in (("train_dataset", "train"), ("eval_dataset", "held-out")):
        rows = getattr(trainer, side)
        if rows is None:
            continue
        rows = rows.remove_columns([column for column in COLUMNS if column in rows.column_names])
        digests = cache.digests(rows)
        order = _longest_first(rows, digests)
        key = cache.key_of(facts, [digests[index] for index in order], batch_size)
        with cache.opened(key, len(rows), console) as entry:
            if anew:
                entry.forget()
            num_found = sum(map(len, entry.batches))
            _complete(trainer, rows, order, entry, batch_size, title, console)
            batches = entry.batches
        for number, column in enumerate(COLUMNS):
            values = np.empty(len(rows))
            values[order] = np.concatenate([(batch.chosen, batch.rejected)[number] for batch in batches])
            rows = rows.add_column(column, values.tolist())
        setattr(trainer, side, rows)
        batch_size = batches[-1].fitting
        ends = done.ends or [order[: len(batches[0])], order[-len(batches[-1]) :]][: len(batches)]
        done = Pass(ends, done.pairs + len(rows), done.reused + num_found, [*done.keys, key])
    trainer.precompute_ref_logps = True
    return done


def _complete(
    trainer: Any,
    rows: Dataset,
    order: list[int],
    entry: cache.Entry,
    batch_size: int,
    title: str,
    console: Console,
) -> None:
    """Computes the batches that the entry lacks, bounded as one pass without a break would have bounded them."""
    start = sum(map(len, entry.batches))
    if start:
        batch_size = entry.batches[-1].fitting
        console.print(f"reference log-probs: {start:,} of {len(rows):,} {title} pairs were there already")
    if start == len(rows):
        return
    with (
        bar(
            console, f"reference log-probs, {len(rows) - start:,} {title} pairs", len(rows) - start
        ) as advance,
        use_adapter(trainer.model, REF_ADAPTER),
    ):
        while start < len(order):
            log_probs, batch_size = trainer.recovery.halving(
                "reference pass",
                batch_size,
                lambda size, start=start: log_probs_of(
                    trainer, batch_of(trainer, rows, order[start : start + size])
                ),
                lambda start=start: f"pair {order[start]} of {rows[order[start]]['length']} tokens",
            )
            chosen, rejected = (values.cpu().numpy() for values in log_probs)
            entry.append(cache.Batch(batch_size, chosen, rejected))
            start += len(chosen)
            advance(len(chosen))


def _longest_first(rows: Dataset, digests: list[bytes]) -> list[int]:
    """By length and then by content: who shares a batch with whom depends on the set of pairs, not on its order."""
    lengths = rows["length"][:]
    return sorted(range(len(rows)), key=lambda index: (-lengths[index], digests[index]))


def batch_of(trainer: Any, rows: Dataset, indices: list[int]) -> Any:
    return trainer._prepare_inputs(trainer.data_collator([rows[index] for index in indices]))


def log_probs_of(trainer: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(reply | prompt), summed over the reply's tokens: (pairs,) for chosen and for rejected, fp32.

    Through the same fused head that the trainer's loss uses, with the adapter that is active.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
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
