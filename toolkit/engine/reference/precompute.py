"""The pass that computes the reference's log-probs of every row, before training begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset
from rich.console import Console
from trl.trainer.utils import use_adapter

from toolkit.console.screen import bar
from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.base import recompute
from toolkit.engine.base.micro_batches import row_tokens
from toolkit.engine.base.ranks import Ranks
from toolkit.engine.reference import cache
from toolkit.engine.reference.kinds import LABELLED, Kind
from toolkit.engine.shared_prompt.hooks import TREE, installed

REF_ADAPTER = "ref"  # TRL's name for it


@dataclass(frozen=True)
class Pass:
    """What a reference pass did. `ends` are the rows of the train set's first and last batch, as they were batched."""

    ends: list[list[int]]
    pairs: int
    reused: int
    keys: list[str]  # where the cache holds them


def precompute(trainer: Any, batch_size: int, console: Console, anew: bool = False) -> Pass:
    """Adds the columns of its `reference_kind` to the trainer's rows, from disk where they are kept there.

    Of several processes each computes its part. At most `batch_size` pairs run at once, fewer where the trainer's
    micro-batches end; where they find no room it goes on with a half, a quarter ... With `anew` nothing that is kept is
    used.
    """
    kind = trainer.reference_kind
    facts = cache.facts_of(trainer.model, REF_ADAPTER, trainer.processing_class.pad_token_id)
    facts["autocast"] = [trainer.args.bf16, trainer.args.fp16]
    sharing = installed(trainer.model)
    facts["shared_prompts"] = sharing.kernel if sharing else None
    facts["micro_batches"] = [trainer.micro_batches.tokens, trainer.micro_batches.rows]
    orders = []
    for side, title, is_trained in (("train_dataset", "train", True), ("eval_dataset", "held-out", False)):
        rows = getattr(trainer, side)
        if rows is None:
            continue
        rows = rows.remove_columns([column for column in kind.columns if column in rows.column_names])
        of_side = facts | {"training": is_trained}
        order = _Order.of(rows, kind, title, is_trained, of_side, batch_size, trainer.processes)
        with cache.opened(order.key, len(order.indices), console) as entry:
            if anew:
                entry.forget()
            order.num_found = sum(map(len, entry.batches))
            _complete(trainer, order, entry, batch_size, console)
            order.batches = entry.batches
        setattr(trainer, side, order.rows_with_log_probs(trainer.processes))
        if order.batches:
            batch_size = order.batches[-1].fitting  # what fitted here is where the next set begins
        orders.append(order)
    trainer.precompute_ref_logps = True
    return Pass(
        ends=orders[0].ends(),
        pairs=sum(len(order.rows) for order in orders),
        reused=sum(order.num_found for order in orders),
        keys=[order.key for order in orders],
    )


@dataclass
class _Order:
    """The rows of one set in the order in which they are computed, longest first: those of this process, and of all
    processes by rank. `title` names the set.

    `is_trained`: the policy will see them in training's forward, else in that of an evaluation.
    """

    rows: Dataset
    kind: Kind
    title: str
    is_trained: bool
    of_all: list[list[int]]
    indices: list[int]
    key: str  # of the entry in the cache
    num_found: int = 0
    batches: list[cache.Batch] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Dataset,
        kind: Kind,
        title: str,
        is_trained: bool,
        facts: dict[str, Any],
        batch_size: int,
        processes: Ranks,
    ) -> _Order:
        digests = cache.digests(rows, kind.ids)
        order = _longest_first(rows, kind, digests)
        of_all = [order[rank :: processes.size] for rank in range(processes.size)]
        indices = of_all[processes.rank]
        key = cache.key_of(facts, [digests[i] for i in indices], batch_size)
        return cls(rows, kind, title, is_trained, of_all, indices, key)

    def rows_with_log_probs(self, processes: Ranks) -> Dataset:
        """The rows in their own order, with both columns: in memory, for nothing of them may come from a file that
        nobody sealed. That is 4 bytes a token."""
        rows = self.rows.flatten_indices(keep_in_memory=True)
        first, second = (
            [batch.first for batch in self.batches],
            [batch.second for batch in self.batches],
        )
        processes.meet()  # what one of them has on disk another may compute for hours
        for column, of_side in zip(self.kind.columns, (first, second), strict=True):
            values = np.empty(len(rows))
            found = processes.gather(np.concatenate([np.empty(0), *of_side]).tolist())
            for indices, of_rank in zip(self.of_all, found, strict=True):
                values[indices] = of_rank
            rows = rows.add_column(column, values.tolist())
        return rows

    def ends(self) -> list[list[int]]:
        """The rows of the first and of the last batch; of one batch alone where that is all."""
        first, last = len(self.batches[0]), len(self.batches[-1])
        return [self.indices[:first], self.indices[-last:]][: len(self.batches)]


def _complete(trainer: Any, order: _Order, entry: cache.Entry, batch_size: int, console: Console) -> None:
    """Computes the batches that the entry lacks, bounded as one pass without a break would have bounded them."""
    num_done, num_pairs = sum(map(len, entry.batches)), len(order.indices)
    if num_done:
        batch_size = entry.batches[-1].fitting
        console.print(
            f"reference log-probs: {num_done:,} of {num_pairs:,} {order.title} {order.kind.called} were there already"
        )
    if num_done == num_pairs:
        return
    title = f"reference log-probs, {num_pairs - num_done:,} {order.title} {order.kind.called}"
    with (
        bar(console, title, num_pairs - num_done) as advance,
        use_adapter(trainer.model, REF_ADAPTER),
        forward_of(trainer.model, training=order.is_trained),
    ):
        while num_done < num_pairs:
            batch = _next_batch(
                trainer, order.rows, order.indices[num_done : num_done + batch_size], batch_size
            )
            entry.append(batch)
            batch_size = batch.fitting
            num_done += len(batch)
            advance(len(batch))


def _next_batch(trainer: Any, rows: Dataset, indices: list[int], batch_size: int) -> cache.Batch:
    """The log-probs of the first of these pairs, as many of them as find room at once."""
    pairs = [rows[index] for index in indices]
    size = trainer.micro_batches.first(pairs, len(pairs))

    def of_first(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs_of(trainer, batch_of(trainer, pairs[:size]))

    def longest() -> str:
        return f"row {indices[0]} of {row_tokens(pairs[0])} tokens"

    log_probs, fitting = trainer.recovery.halving("reference pass", size, of_first, longest)
    first, second = (values.cpu().numpy() for values in log_probs)
    return cache.Batch(fitting if fitting < size else batch_size, first, second)


def _longest_first(rows: Dataset, kind: Kind, digests: list[bytes]) -> list[int]:
    """By length and then by content: who shares a batch with whom depends on the set of rows, not on its order."""
    lengths: list[int] = []
    for some in rows.select_columns(list(kind.ids)).with_format("arrow").iter(1000):
        prompt, *replies = (
            pyarrow.compute.list_value_length(some[name].combine_chunks()).to_numpy() for name in kind.ids
        )
        lengths += (prompt + np.maximum(*replies)).tolist()
    return sorted(range(len(rows)), key=lambda index: (-lengths[index], digests[index]))


@contextlib.contextmanager
def forward_of(model: Any, training: bool) -> Iterator[None]:
    """The forward that training takes, or an evaluation, without recomputation.

    On a GPU Unsloth's two differ in mask, attention and expanded keys (unsloth/models/llama.py, attention_dispatch.py),
    and with them in the last bits of every log-prob; its trainer leaves the model in the second one.
    """
    before = model.training
    model.train(training)
    try:
        with recompute.recomputing(model, 0):
            yield
    finally:
        model.train(before)


def batch_of(trainer: Any, pairs: list[Any]) -> Any:
    return trainer._prepare_inputs(trainer.data_collator(pairs))


def log_probs_of(trainer: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(reply | prompt), summed over the reply's tokens: (pairs,) for chosen and for rejected, or (rows,) for a
    row's own reply and that of its neighbour; fp32.

    Through the same fused head that the trainer's loss uses, with the adapter that is active.
    """
    if trainer.reference_kind is LABELLED:
        return _summed(trainer, batch), _summed(trainer, batch, "KL_")
    chosen, rejected = _summed(trainer, batch).chunk(2)
    return chosen, rejected


def _summed(trainer: Any, batch: Any, prefix: str = "") -> torch.Tensor:
    ids = batch[f"{prefix}input_ids"]
    labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, IGNORE_INDEX)
    with torch.no_grad(), trainer.accelerator.autocast():
        output = trainer.model(
            input_ids=ids,
            attention_mask=batch[f"{prefix}attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
            **{key: batch[key] for key in (TREE,) if key in batch},
        )
    summed: torch.Tensor = output.log_probs.float().sum(dim=1)
    return summed
