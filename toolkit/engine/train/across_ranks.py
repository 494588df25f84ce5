"""A trainer as one of several processes: its part of each step's rows, and what is summed with the others.

Each process trains as it would alone, in pieces of its own size, and once a step the gradients are summed, each weighed
by its part of the trained tokens (or rows): a step's gradient is the mean over the effective batch, whatever the number
of processes. The rows of each step, schedule and learning rate are those of one process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler

from toolkit.engine.base import ranks
from toolkit.engine.base.ranks import Ranks
from toolkit.engine.reference.cache import fingerprint
from toolkit.engine.train.interrupt import Dropped, StopOnSignal
from toolkit.engine.train.pieces import EXTREMES
from toolkit.errors import UserError

if TYPE_CHECKING:
    from trl import DPOTrainer as TrainerOfTRL  # what it is mixed into
else:
    TrainerOfTRL = object

LOSSES = {"loss", "train_loss"}  # of which each process logs its part
RNG = "rng_state.pth"  # the Trainer's name for it, of one process
Deal = Callable[[list[int]], Sequence[int]]  # (rows of a step) -> those of this process


class OwnRows(Sampler[int]):
    """This process's rows of each step, in the order of the steps that all of them follow.

    Of a step that has fewer rows than there are processes some get none: they take its first row as a stand-in.
    """

    def __init__(self, order: Any, rows_per_step: int, deal: Deal):
        self._order, self._rows_per_step, self._deal = order, rows_per_step, deal

    def __iter__(self) -> Iterator[int]:
        for step in _cut(list(self._order), self._rows_per_step):
            yield from self._deal(step) or step[:1]

    def __len__(self) -> int:
        return sum(
            max(1, len(self._deal(step))) for step in _cut(list(range(len(self._order))), self._rows_per_step)
        )

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)


class AcrossRanks(TrainerOfTRL):
    """Mixin, the first one before a trainer. Its keyword `processes` are the other processes; alone it changes nothing.

    `stop` hears the signals that the others got. Held-out rows are split too, unless `splits_evaluation` is off.
    """

    stop: StopOnSignal | None = None
    splits_evaluation = True
    _total_train_tokens: float
    _loss_of_step: float | torch.Tensor = 0.0

    def __init__(self, *args: Any, processes: Ranks | None = None, **kwargs: Any):
        self.processes = processes or ranks.ALONE
        super().__init__(*args, **kwargs)

    # Rows

    @property
    def _rows_per_step(self) -> int:
        args = self.args
        own: int = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return own * self.processes.size

    def _deal(self, step: list[int]) -> list[int]:
        """Every `size`th row by length, there and back: as many rows and nearly as many tokens for each process."""
        size, rank = self.processes.size, self.processes.rank
        longest_first = sorted(step, key=self._lengths.__getitem__, reverse=True) if self._lengths else step
        rounds = enumerate(_cut(longest_first, size))
        dealt = (some if number % 2 == 0 else some[::-1] for number, some in rounds)
        return [some[rank] for some in dealt if rank < len(some)]

    @cached_property
    def _lengths(self) -> list[int]:
        rows = self.train_dataset
        return list(rows["length"][:]) if "length" in rows.column_names else []

    def _order_of_all(self, order: Any) -> Any:
        """The order in which one process would take the rows."""
        if isinstance(order, RandomSampler):  # what accelerate makes of it
            return SeedableRandomSampler(order.data_source, data_seed=self.args.data_seed)
        return order

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        order = super()._get_train_sampler(*args, **kwargs)
        if self.processes.is_alone:
            return order
        return OwnRows(self._order_of_all(order), self._rows_per_step, self._deal)

    def _rows_of_step(self) -> int:
        """This process's, of the step that runs."""
        num_rows, at_most = len(self.train_dataset), self._rows_per_step
        before: int = self.state.global_step % math.ceil(num_rows / at_most) * at_most
        in_step = min(at_most, num_rows - before)
        return len(range(self.processes.rank, in_step, self.processes.size))

    # A step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As one process would run it; the last of a step also sums its gradients with those of the others.

        The losses that it returns for a step add up to this process's part of the loss of all.
        """
        train = super().training_step
        loss: torch.Tensor
        if self.processes.is_alone:
            loss = train(model, inputs, num_items_in_batch)
            return loss
        with contextlib.nullcontext() if self._rows_of_step() else self._unlogged():
            loss = train(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            self._loss_of_step = self._loss_of_step + loss
            return loss
        before, self._loss_of_step = self._loss_of_step, 0.0
        weight = self._weight(num_items_in_batch)
        self._sum_gradients(weight)
        if self.stop:
            self.stop.agree()
        return (before + loss) * weight - before if weight else loss.new_zeros(())

    def _weight(self, num_items_in_batch: Any) -> float:
        """What this process's mean counts in that of all: its part of the trained tokens where the loss is a mean over
        those of the step (Unsloth or the Trainer counts them, each process its own), else of the rows. A stand-in: 0.
        """
        rows, is_counted = self._rows_of_step(), num_items_in_batch is not None
        tokens = float(num_items_in_batch) if rows and is_counted else 0.0
        all_rows, all_tokens, uncounted = self.processes.sum(rows, tokens, not is_counted)
        return rows / all_rows if uncounted else tokens / all_tokens

    def _sum_gradients(self, weight: float) -> None:
        """Replaces the gradients by the weighted mean over the processes."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        if weight:
            torch._foreach_mul_(gradients, weight)
        else:
            torch._foreach_zero_(gradients)  # even of one that is no number
        self.processes.add_up(gradients)

    @contextlib.contextmanager
    def _unlogged(self) -> Iterator[None]:
        """What trains in the block leaves nothing in the log, but how many tokens there were before."""
        log, tokens = self._metrics["train"], self._total_train_tokens
        self._metrics["train"] = defaultdict(list)
        try:
            yield
        finally:
            self._metrics["train"], self._total_train_tokens = log, tokens
            log["num_tokens"] = [tokens]

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.processes.is_alone:
            for name in sorted(LOSSES & logs.keys()):
                [logs[name]] = self.processes.sum(logs[name])
            mode = "train" if self.model.training else "eval"
            merged = merge(self.processes.gather(dict(self._metrics[mode])), same_batches=mode == "train")
            self._metrics[mode].clear()
            self._metrics[mode].update(merged)
        super().log(logs, start_time)

    # Held-out rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batch by batch in turn, batched as one process would."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.processes.is_alone and self.splits_evaluation:
            batches = _cut(list(range(len(rows))), self.args.per_device_eval_batch_size)
            own = batches[self.processes.rank :: self.processes.size]
            rows = rows.select(list(itertools.chain.from_iterable(own)))
        return super().get_eval_dataloader(rows)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if self.processes.is_alone:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        output, is_dropped = None, False
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        except Dropped:
            is_dropped = True
        own = len(dataloader.dataset)
        loss = output.metrics.get("eval_loss", 0.0) if output else 0.0
        dropped, rows, total = self.processes.sum(is_dropped, own, own * loss)
        if self.stop:
            self.stop.agree()
        if dropped or output is None:
            raise Dropped(is_step_complete=True)
        if self.splits_evaluation and rows:
            output.metrics["eval_loss"] = total / rows
        return output

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """In the first process, with the random states of all."""
        if self.processes.is_alone:
            super()._save_checkpoint(model, trial)
            return
        self.check_equal()
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            own = (Path(folder) / RNG).read_bytes()
        self._random_states = self.processes.gather(ranks.encoded(own))
        tokens, (total,) = self._total_train_tokens, self.processes.sum(self._total_train_tokens)
        if self.processes.is_first:
            self._total_train_tokens = self.state.num_input_tokens_seen = total
            super()._save_checkpoint(model, trial)
            self._total_train_tokens = tokens
        self.processes.meet()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        for rank in range(1, self.processes.size):
            state = ranks.decoded(self._random_states[rank])
            (Path(output_dir) / _rng_of(rank)).write_bytes(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.processes.is_first:
            super()._load_rng_state(checkpoint)
            return
        own = Path(checkpoint) / _rng_of(self.processes.rank)
        if not own.exists():  # saved by fewer processes
            torch.manual_seed(self.args.seed + self.processes.rank)
            return
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(own, Path(folder) / RNG)
            super()._load_rng_state(folder)

    def check_equal(self) -> None:
        """Raises UserError unless the trained weights are the same, bit for bit, in all processes."""
        if self.processes.is_alone:
            return
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        found = self.processes.gather(fingerprint(trained))
        if apart := [rank for rank, value in enumerate(found) if value != found[0]]:
            raise UserError(
                f"the trained weights of process {apart[0]} of {self.processes.size} are no longer those of the first "
                f"at step {self.state.global_step}: one of the two got other sums, which no working machine does. "
                "Nothing of it is saved; the last checkpoint is good. Check the cards' memory (nvidia-smi -q -d ECC) "
                "and continue with the same command"
            )


class GroupsAcrossRanks(AcrossRanks):
    """The same before a trainer that learns from rewards: the completions of a prompt stay together."""

    splits_evaluation = (
        False  # the dice of a held-out completion do not depend on who throws them: all make all of them
    )
    averages_rows: bool
    _evaluates: bool
    _completion_tokens = 1.0  # of the probe, which generates nothing

    def _order_of_all(self, order: Any) -> Any:
        order.batch_size *= self.processes.size  # prompts of a step
        return order

    def _deal(self, step: list[int]) -> list[int]:
        own = len(step) // self.processes.size
        return step[self.processes.rank * own :][:own]

    def _rows_of_step(self) -> int:
        return self._rows_per_step // self.processes.size  # what does not fill a step is left out

    def _weight(self, num_items_in_batch: Any) -> float:
        own = (
            1.0 if self.averages_rows else self._completion_tokens
        )  # GRPO's mean is over the tokens of the step
        return own / self.processes.sum(own)[0]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        if not self._evaluates and "num_items_in_batch" in found and not self.processes.is_alone:
            self._completion_tokens = float(found["num_items_in_batch"])
        return found


def merge(logged: list[dict[str, list[float]]], same_batches: bool) -> dict[str, list[float]]:
    """What TRL would have kept between two logs, had one process run all micro-batches.

    `same_batches`: the n-th micro-batches of the processes are parts of one, else each is whole.
    """
    merged: dict[str, list[float]] = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(logged)):
        found = [one[name] for one in logged if one.get(name)]
        if name == "num_tokens":  # a running total, of each process its own
            merged[name] = [sum(values[-1] for values in found)]
        elif same_batches and (extreme := EXTREMES.get(name.rpartition("/")[2].partition("_")[0])):
            merged[name] = [extreme(values) for values in zip(*found, strict=False)]
        else:
            merged[name] = list(itertools.chain.from_iterable(found))
    return merged


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _rng_of(rank: int) -> str:
    return f"rng_state_{rank}.pth"
