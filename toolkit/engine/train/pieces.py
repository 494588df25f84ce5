"""Batches that can run in pieces: recovery from out-of-memory errors inside TRL's trainers.

A failed piece leaves nothing behind: gradients, RNG and TRL's metrics are put back, and the rows run again, half
as many at once. The factor stays for the rest of the run. Optimizer, schedule, order of rows and effective batch
never learn of it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import torch

from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.base import oom
from toolkit.engine.base.random_state import RandomState
from toolkit.engine.train import recompute
from toolkit.errors import UserError

ROWS = "rows_of_this_batch"  # where a batch carries the rows that it was collated from


@dataclass(frozen=True)
class Rows:
    """Rows of a batch; no list, so that nobody copies, pins or moves their token ids."""

    rows: list[dict[str, Any]]


class KeepRows:
    """A collator whose batches carry their rows: any part of them can be collated again, padded or packed."""

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        batch[ROWS] = Rows(rows)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["collator"], name)


class OutOfMemoryRecovery:
    """Mixin before TRL's SFTTrainer or DPOTrainer; its keyword `recovery` holds the state.

    While nothing happens a micro-batch costs a copy of the RNG states (10 kB) and, from the second of an
    accumulation window on, one addition over the LoRA gradients (168 MB in fp32 for 8B at r=16: about 0.5 ms on a
    4090). The sum so far is set aside, not copied: it is there anyway when the loss is computed, where runs that
    keep activations peak.
    Where every layer recomputes, the end of backward holds one set of gradients more (0.16 GiB).
    """

    def __init__(self, *args: Any, recovery: oom.Recovery, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recovery = recovery
        self.data_collator = KeepRows(self.data_collator)
        self._share = 1.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs.pop(ROWS, None)
        loss = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if (
            self._share != 1.0 and num_items_in_batch is None
        ):  # else the loss is a share of the window's tokens
            loss = loss * self._share
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients and loss of one micro-batch, at once or in pieces."""

        def step(batch: Any, share: float) -> torch.Tensor:
            self._share = share
            try:
                return super(OutOfMemoryRecovery, self).training_step(model, batch, num_items_in_batch)
            finally:
                self._share = 1.0

        losses = [loss for loss, _ in self._in_pieces("train", inputs, step)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The held-out loss of a batch, at once or in pieces: the mean over its tokens (pairs in DPO)."""
        assert prediction_loss_only

        def step(batch: Any, share: float) -> torch.Tensor:
            return super(OutOfMemoryRecovery, self).prediction_step(model, batch, True, ignore_keys)[0]

        pieces = self._in_pieces("eval", inputs, step)
        if len(pieces) == 1:
            return pieces[0][0], None, None
        total = sum(weight[""] for _, weight in pieces)
        return torch.stack([loss * (weight[""] / total) for loss, weight in pieces]).sum(), None, None

    def _in_pieces(
        self, mode: str, inputs: Any, step: Callable[[Any, float], torch.Tensor]
    ) -> list[tuple[torch.Tensor, dict[str, float]]]:
        """Runs a batch whole or in pieces, smaller ones after each failure. Returns loss and weights of each."""
        rows = inputs[ROWS].rows
        losses: list[tuple[torch.Tensor, dict[str, float]]] = []
        metrics: list[dict[str, list[float]]] = []
        todo = deque(_chunks(rows, self.recovery.split[mode], len(rows)))
        with ExitStack() as until_done:
            while todo:
                whole = len(todo[0]) == len(rows)
                batch = inputs if whole else self.data_collator(todo[0])
                weights = {} if whole else metric_weights(batch)
                share = 1.0 if whole else weights[""] / max(metric_weights(inputs)[""], 1)
                work = partial(step, dict(batch), share)
                loss, logged = self._undoable(mode, work)
                if isinstance(loss, oom.OutOfMemory):
                    todo = self._smaller(mode, loss, todo, len(rows), until_done)
                else:
                    todo.popleft()
                    losses.append((loss, weights))
                    metrics.append(logged)
        merge_metrics(self._metrics[mode], metrics, [weights for _, weights in losses])
        return losses

    @cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        """The trainable parameters; found once, because the walk over an 8B model takes milliseconds."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _undoable(self, mode: str, work: Callable[[], torch.Tensor]) -> tuple[Any, dict[str, list[float]]]:
        """(loss, what TRL logged of it); after OutOfMemory gradients, RNG and counters are as before."""
        trained = self._trained if mode == "train" else []
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        generators, tokens, log = RandomState(), self._total_train_tokens, self._metrics[mode]
        self._metrics[mode] = logged = defaultdict(list)
        try:
            loss = oom.attempt(work)
        finally:
            self._metrics[mode] = log
        if isinstance(loss, oom.OutOfMemory):
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient
            generators.restore()
            self._total_train_tokens = tokens
        else:
            _add_gradients(trained, before)
        return loss, logged

    def _smaller(
        self, mode: str, failed: oom.OutOfMemory, todo: deque[list[Any]], num_rows: int, until_done: ExitStack
    ) -> deque[list[Any]]:
        """The rows that are left in pieces smaller than the one that failed; a single row recomputes all layers."""
        split, failed_size = self.recovery.split, len(todo[0])
        if failed_size > 1:
            while math.ceil(num_rows / split[mode]) >= failed_size:
                split[mode] *= 2
            todo = deque(_chunks([row for piece in todo for row in piece], split[mode], num_rows))
            self._record(mode, failed, f"{mode} batches now run in pieces of {len(todo[0])}")
            return todo
        all_layers = len(recompute.layers(self.model))
        if mode == "eval" or recompute.num_recomputing(self.model) == all_layers:
            self._give_up(mode, failed, todo[0][0])
        self._record(mode, failed, f"a single row: all {all_layers} layers recompute for this micro-batch")
        until_done.enter_context(recompute.everything(self.model))
        return todo

    def _record(self, mode: str, failed: oom.OutOfMemory, action: str) -> None:
        where, step = "evaluation", self.state.global_step
        if mode == "train":
            where, step = "training", step + 1
        self.recovery.record(where, step, failed, action, self.recovery.split[mode])

    def _give_up(self, mode: str, failed: oom.OutOfMemory, row: dict[str, Any]) -> NoReturn:
        """Saves what was trained, then raises UserError naming the row."""
        self._record(mode, failed, "nothing is left to give up: stopping")
        event, saved = self.recovery.events[-1], ""
        if self.recovery.renamed is None and self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
            saved = f". The state after step {self.state.global_step} is saved in {self.args.output_dir}"
        rows = self.train_dataset if mode == "train" else self.eval_dataset
        raise UserError(
            f"out of memory ({event['where']}, step {event['step']}) with a single row of {row_tokens(row)} tokens"
            f"{_place(rows, row)} and nothing kept from its forward pass: {oom.fixes()}{saved}"
        )


def metric_weights(batch: Any) -> dict[str, float]:
    """What TRL's averages over a batch are averages of: "" stands for every name that is not listed."""
    if "completion_mask" in batch:
        chosen, rejected = (side.sum().item() for side in batch["completion_mask"][:, 1:].chunk(2))
        pairs = len(batch["completion_mask"]) // 2
        return {
            "": pairs,
            "entropy": chosen + rejected,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "mean_token_accuracy": chosen,
        }
    return {"": (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()}


def merge_metrics(
    log: dict[str, list[float]], pieces: list[dict[str, list[float]]], weights: list[dict[str, float]]
) -> None:
    """Adds to TRL's `log` what the whole batch would have logged: one value a metric, the mean over its pieces."""
    for name, values in pieces[-1].items():
        if name == "num_tokens" or len(pieces) == 1:
            log[name] = values if name == "num_tokens" else log[name] + values  # the first is a running total
            continue
        of_name = [weight.get(name, weight[""]) for weight in weights]
        total = sum(weight * piece[name][0] for weight, piece in zip(of_name, pieces, strict=True))
        log[name] = [*log[name], total / max(sum(of_name), 1)]


def row_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row as it is trained; of a pair, those of its longer side."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _chunks(rows: Any, factor: int, num_rows: int) -> list[Any]:
    """Consecutive pieces of ceil(num_rows / factor)."""
    size = math.ceil(num_rows / factor)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _add_gradients(parameters: list[torch.nn.Parameter], before: list[torch.Tensor | None]) -> None:
    """Adds the sum so far to the new gradients, in one fused launch where there is one."""
    new, old = [], []
    for parameter, gradient in zip(parameters, before, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            new.append(parameter.grad)
            old.append(gradient)
    if new:
        torch._foreach_add_(new, old)


def _place(rows: Any, row: dict[str, Any]) -> str:
    """Where a row stands among the prepared ones; looked up only when a run ends."""
    key = "input_ids" if "input_ids" in row else "prompt_ids"
    found = next((index for index, ids in enumerate(rows[key]) if ids == row[key]), None)
    return "" if found is None else f" (prepared row {found})"
