"""DPO with the prompt of a pair run once: where the model allows it, checked before and counted in the first step."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from toolkit.engine.base import recompute
from toolkit.engine.data import preparation
from toolkit.engine.reference.precompute import forward_of, log_probs_of
from toolkit.engine.shared_prompt import check
from toolkit.engine.shared_prompt.hooks import NotShared, SharedPrompts, TreeCollator
from toolkit.engine.shared_prompt.tree import Lengths, Uses
from toolkit.errors import UserError


def establish(trainer: Any, max_length: int, console: Console) -> dict[str, Any]:
    """Lets the trainer's pairs share their prompts, once some of them came out as they do padded.

    Returns what the report says: the check in nats and the attention's `kernel`, or the reason `off`. Raises UserError
    where the check fails.
    """
    try:
        sharing = SharedPrompts(trainer.model, max_length)
    except NotShared as reason:
        console.print(f"[yellow]prompts are run twice, once a reply: {escape(str(reason))}[/]")
        return {"off": str(reason)}
    padded = trainer.data_collator.collator
    shared = trainer.data_collator.collator = TreeCollator(padded)

    def log_probs(rows: list[Any], is_shared: bool) -> torch.Tensor:
        batch = trainer._prepare_inputs((shared if is_shared else padded)(rows))
        with forward_of(trainer.model, training=True):
            return torch.cat(log_probs_of(trainer, batch))

    rows = trainer.train_dataset.select_columns(preparation.IDS["pair"])
    checked = check.compare(
        [rows[row] for row in check.choose(_lengths(rows))],
        log_probs,
        torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype,
    )
    check.require(checked)
    trainer.micro_batches = replace(trainer.micro_batches, shares_prompts=True)
    trainer.add_callback(FirstCalls(trainer, sharing))
    console.print(
        f"[green]prompts are shared[/] ({sharing.kernel}): log-probs of {checked.pairs} pairs differ from padded ones "
        f"by {checked.median:.1e} nats in the median, {checked.worst:.1e} at most (another padding: "
        f"{checked.median_noise:.1e}, {checked.worst_noise:.1e})"
    )
    return {"kernel": sharing.kernel} | asdict(checked)


def _lengths(rows: Dataset) -> list[Lengths]:
    """Read off Arrow's offsets: 40,000 pairs hold some 40M tokens."""
    found: list[Lengths] = []
    for some in rows.with_format("arrow").iter(1000):
        found += zip(
            *(pyarrow.compute.list_value_length(ids).to_pylist() for ids in some.columns), strict=True
        )
    return found


class FirstCalls(TrainerCallback):
    """Counts, in the first step, the attention calls that carried a tree: a layer that lost it would see everything."""

    def __init__(self, trainer: Any, sharing: SharedPrompts):
        self._trainer, self._sharing = trainer, sharing
        self._num_events: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._num_events is None:
            self._sharing.uses = Uses()  # the probe's and the reference pass's are not the step's
            self._num_events = len(self._trainer.recovery.events)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        said = self._trainer.shared_prompts
        if "attention_calls" in said:
            return
        uses, model = self._sharing.uses, self._trainer.model
        expected = uses.passes * (self._sharing.num_layers + recompute.num_recomputing(model))
        said |= {"attention_calls": uses.attention_calls, "expected_calls": expected}
        ran_as_planned = (
            len(self._trainer.recovery.events) == self._num_events
        )  # a failed piece calls some in vain
        if not uses.attention_calls or (ran_as_planned and uses.attention_calls != expected):
            raise UserError(
                f"of {expected} attention calls of the first step {uses.attention_calls} were over shared prompts: the "
                "installed versions lose them on the way, and replies would see what they must not. Report it with "
                "log.txt; --set dpo.share_prompts=false trains without it"
            )
