"""Batches that run in pieces: as many rows at once as a number of tokens allows, fewer after an out-of-memory error.

A failed piece leaves nothing behind: gradients, RNG and TRL's metrics are put back, and the rows run again, half
as many at once. The factor stays for the rest of the run. Optimizer, schedule, order of rows and effective batch
never learn of it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.base import oom, recompute
from toolkit.engine.base.micro_batches import MicroBatches, fed_tokens, longest, row_tokens
from toolkit.engine.base.random_state import RandomState
from toolkit.errors import UserError

LAYERS_A_STEP = 8  # of 32 a step costs 9% of the time by FLOPs, all of them 46%
ID_COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
REWARDS, MARGIN = (
    ("rewards/chosen", "rewards/rejected"),
    "rewards/margins",
)  # of KTO a piece may hold one class alone
EXTREMES = {"min": min, "max": max}  # how names of TRL's metrics begin that are no averages
ROWS = "rows_of_this_batch"  # where a batch carries the rows that it was collated from
MOST_RAN = (
    512  # micro-batches whose losses and rows are kept between two logs; rows of 1,000 tokens take 8 kB each
)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch; no list, so that nobody copies, pins or moves their token ids."""

    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Ran:
    """A micro-batch of training: its step from 1 on, its loss (a scalar on the device), its rows."""

    step: int
    loss: torch.Tensor
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """What came of rows that ran at once: their loss, what TRL logged of it, and what those averages are averages of
    (`metric_weights`; {} for all rows of a batch)."""

    rows: list[dict[str, Any]]
    loss: torch.Tensor
    logged: dict[str, list[float]]
    weights: dict[str, float]


Step = Callable[[Any, float], torch.Tensor]  # (batch, its share of the batch that it is a piece of) -> loss


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


if TYPE_CHECKING:
    from trl import DPOTrainer as TrainerOfTRL  # what it is mixed into
else:
    TrainerOfTRL = object


class OutOfMemoryRecovery(TrainerOfTRL):
    """Mixin before a trainer of TRL. Its keyword `recovery` holds the state, `micro_batches` says how a
    batch is cut to begin with; `ran` is what ran last.

    While nothing happens a micro-batch costs a copy of the RNG states (10 kB) and, from the second of an
    accumulation window on, one addition over the LoRA gradients (168 MB in fp32 for 8B at r=16: about 0.5 ms on a
    4090). The sum so far is set aside, not copied: it is there anyway when the loss is computed, where runs that
    keep activations peak.
    Where every layer recomputes, the end of backward holds one set of gradients more (0.16 GiB).
    """

    data_collator: Any
    _total_train_tokens: float

    def __init__(
        self,
        *args: Any,
        recovery: oom.Recovery,
        micro_batches: MicroBatches = MicroBatches(),  # noqa: B008 - frozen
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.recovery, self.micro_batches = recovery, micro_batches
        self.data_collator = KeepRows(self.data_collator)
        self.ran: deque[Ran] = deque(maxlen=MOST_RAN)
        self._share = 1.0

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """Rows of which no micro-batch of so many is larger."""
        return longest(self.train_dataset, count)

    def batch_of(self, rows: list[dict[str, Any]]) -> Any:
        """Rows as a micro-batch that `training_step` takes."""
        return self._prepare_inputs(self.data_collator(rows))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows, counted = inputs.pop(ROWS, None), self._total_train_tokens
        loss = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if model.training and rows is not None and self._total_train_tokens == counted:
            # Unsloth's SFT trainer for GPUs leaves TRL's count out; ours needs no number from the card.
            self._total_train_tokens += sum(map(fed_tokens, rows.rows))
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
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
                loss: torch.Tensor = super(OutOfMemoryRecovery, self).training_step(
                    model, batch, num_items_in_batch
                )
                return loss
            finally:
                self._share = 1.0

        pieces = self._in_pieces("train", inputs, step)
        self.ran += [Ran(self.state.global_step + 1, piece.loss.detach(), piece.rows) for piece in pieces]
        return pieces[0].loss if len(pieces) == 1 else torch.stack([piece.loss for piece in pieces]).sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Training draws after it as it would have without: when it looks at held-out rows shapes nothing."""
        generators = RandomState()
        try:
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            generators.restore()
        return found

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The held-out loss of a batch, at once or in pieces: the mean over its tokens (pairs in DPO)."""
        assert prediction_loss_only

        def step(batch: Any, share: float) -> torch.Tensor:
            loss: torch.Tensor
            loss, _, _ = super(OutOfMemoryRecovery, self).prediction_step(model, batch, True, ignore_keys)
            return loss

        pieces = self._in_pieces("eval", inputs, step)
        if len(pieces) == 1:
            return pieces[0].loss, None, None
        total = sum(piece.weights[""] for piece in pieces)
        return torch.stack([piece.loss * (piece.weights[""] / total) for piece in pieces]).sum(), None, None

    def _in_pieces(self, mode: str, inputs: Any, step: Step) -> list[Piece]:
        """Runs a batch piece by piece, what is left of it in smaller ones after each failure. TRL's log gets what the
        whole batch would have logged. A signal is looked at between pieces."""
        batch = inputs[ROWS].rows
        rows, done = self.micro_batches.ordered(batch), list[Piece]()
        total = cache(lambda: metric_weights(inputs)[""])  # read from the device once, for one piece never
        with ExitStack() as until_done:
            while rows:
                size = self.micro_batches.first(rows, len(batch), self.recovery.split[mode])
                if done and mode == "train":
                    self.callback_handler.on_substep_end(self.args, self.state, self.control)
                piece = self._run_piece(mode, inputs, rows[:size], total, step)
                if not isinstance(piece, oom.OutOfMemory):
                    done.append(piece)
                    rows = rows[size:]
                elif size > 1:
                    self._split_smaller(mode, piece, rows[:size], len(batch))
                else:
                    until_done.enter_context(self._more_layers_recompute(mode, piece, rows[0]))
        merge_metrics(
            self._metrics[mode], [piece.logged for piece in done], [piece.weights for piece in done]
        )
        return done

    def _run_piece(
        self, mode: str, inputs: Any, rows: list[Any], total: Callable[[], float], step: Step
    ) -> Piece | oom.OutOfMemory:
        """Runs these rows of the batch `inputs`; after OutOfMemory it is as if they had not been run."""
        is_all = len(rows) == len(inputs[ROWS].rows)
        batch = inputs if is_all else self.data_collator(rows)
        weights = {} if is_all else metric_weights(batch)
        share = 1.0 if is_all else weights[""] / max(total(), 1)
        loss, logged = self._undoable(mode, partial(step, dict(batch), share))
        return loss if isinstance(loss, oom.OutOfMemory) else Piece(rows, loss, logged, weights)

    @cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        """The trainable parameters; found once, because the walk over an 8B model takes milliseconds."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _undoable(self, mode: str, work: Callable[[], torch.Tensor]) -> tuple[Any, dict[str, list[float]]]:
        """(loss, what TRL logged of it); after OutOfMemory gradients, RNG and counters are as before."""
        trained = self.trained if mode == "train" else []
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        generators, tokens, log = RandomState(), self._total_train_tokens, self._metrics[mode]
        logged: dict[str, list[float]] = defaultdict(list)
        self._metrics[mode] = logged
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

    def _split_smaller(
        self, mode: str, failed: oom.OutOfMemory, rows: list[dict[str, Any]], num_rows: int
    ) -> None:
        """Raises the factor until fewer of these rows, which failed, of a batch of `num_rows` make a piece."""
        split = self.recovery.split
        while (size := self.micro_batches.first(rows, num_rows, split[mode])) >= len(rows):
            split[mode] *= 2
        tokens = self.micro_batches.tokens
        now = f"{tokens // split[mode]:,} tokens" if tokens else f"{size}"
        self._record(mode, failed, f"{mode} batches now run in pieces of {now}")

    def _more_layers_recompute(
        self, mode: str, failed: oom.OutOfMemory, row: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """The last resort for a single row, LAYERS_A_STEP at a time; raises UserError once all layers recompute."""
        num_layers, before = len(recompute.layers(self.model)), recompute.num_recomputing(self.model)
        if mode == "eval" or before == num_layers:
            self._give_up(mode, failed, row)
        num = min(before + LAYERS_A_STEP, num_layers)
        self.recovery.most_recomputing = max(self.recovery.most_recomputing, num)
        self._record(
            mode, failed, f"a single row: {num} of {num_layers} layers recompute for this micro-batch"
        )
        return recompute.recomputing(self.model, num)

    def _record(self, mode: str, failed: oom.OutOfMemory, action: str) -> None:
        where, step = "evaluation", self.state.global_step
        if mode == "train":
            where, step = "training", step + 1
        self.recovery.record(where, step, failed, action, self.recovery.split[mode])

    def _give_up(self, mode: str, failed: oom.OutOfMemory, row: dict[str, Any]) -> NoReturn:
        """Saves what was trained, then raises UserError naming the row."""
        self._record(mode, failed, "nothing is left to give up: stopping")
        event, saved = self.recovery.events[-1], ""
        if self.recovery.renamed is None and self.state.global_step and self.recovery.rank is None:
            self._save_checkpoint(self.model, trial=None)
            saved = f". The state after step {self.state.global_step} is saved in {self.args.output_dir}"
        (place,) = places(self.train_dataset if mode == "train" else self.eval_dataset, [row])
        named = "" if place is None else f" (prepared row {place})"
        raise UserError(
            f"out of memory ({event['where']}, step {event['step']}) with a single row of {row_tokens(row)} tokens"
            f"{named} and nothing kept from its forward pass: {oom.fixes()}{saved}"
        )


def metric_weights(batch: Any) -> dict[str, float]:
    """What TRL's averages over a batch are averages of: "" stands for every name that is not listed."""
    if "KL_completion_mask" in batch:
        return _labelled_weights(batch)
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
    if "labels" not in batch:  # pairs of a reward model
        return {"": len(batch["input_ids"]) // 2}
    return {"": (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()}


def _labelled_weights(batch: Any) -> dict[str, float]:
    """KTO logs what it knows of each class, over its replies or their tokens."""
    good, tokens = batch["label"].bool(), batch["completion_mask"][:, 1:].sum(dim=1)
    chosen, rejected = good.sum().item(), (~good).sum().item()
    return {
        "": chosen + rejected,
        "entropy": tokens.sum().item(),
        "logits/chosen": tokens[good].sum().item(),
        "logits/rejected": tokens[~good].sum().item(),
        **dict.fromkeys(("rewards/chosen", "logps/chosen"), chosen),
        **dict.fromkeys(("rewards/rejected", "logps/rejected"), rejected),
    }


def merge_metrics(
    log: dict[str, list[float]], pieces: list[dict[str, list[float]]], weights: list[dict[str, float]]
) -> None:
    """Adds to TRL's `log` what the whole batch would have logged: one value a metric, the mean over its pieces, or the
    smallest or largest of them. A piece that does not log a metric has none of the rows that it is of."""
    names = dict.fromkeys(itertools.chain.from_iterable(pieces))
    of_sides = len(pieces) > 1 and names.keys() >= set(REWARDS)
    for name in names:
        if name == "num_tokens" or len(pieces) == 1:
            values = pieces[-1][name]
            log[name] = values if name == "num_tokens" else log[name] + values  # the first is a running total
            continue
        if name == MARGIN and of_sides:
            continue
        if extreme := EXTREMES.get(name.partition("_")[0]):
            log[name] = [*log[name], extreme(piece[name][0] for piece in pieces)]
            continue
        logged = [
            (weight.get(name, weight[""]), piece[name][0])
            for weight, piece in zip(weights, pieces, strict=True)
            if name in piece
        ]
        total = sum(weight for weight, _ in logged)
        log[name] = [*log[name], sum(weight * value for weight, value in logged) / max(total, 1)]
    if of_sides:
        chosen, rejected = (log[name][-1] for name in REWARDS)
        log[MARGIN] = [*log[MARGIN], chosen - rejected]


def ids_of(row: dict[str, Any]) -> tuple[list[int], ...]:
    """The token ids of a row, the first of its sequences first."""
    return tuple(row[column] for column in ID_COLUMNS if column in row)


def places(prepared: Any, rows: list[dict[str, Any]]) -> list[int | None]:
    """Where each row stands among the prepared ones, None where it does not; looked up only when a run ends."""
    wanted = [ids_of(row) for row in rows]
    found: list[int | None] = [None] * len(rows)
    columns = [name for name in ID_COLUMNS if name in rows[0] and name in prepared.column_names]
    for index, row in enumerate(prepared.select_columns(columns)):
        for number, ids in enumerate(wanted):
            if found[number] is None and ids == ids_of(row):
                found[number] = index
    return found


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
