"""A trainer as one of several processes: its part of each step's rows, and what is summed with the others.

Each process trains as it would alone, in pieces of its own size, and once a step the gradients are summed: that of an
optimizer step is the mean over the rows (or the trained tokens) of the effective batch, whatever the number of
processes. The rows of each step, schedule and learning rate are those of one process.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
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

    def __init__(self, *args: Any, processes: Ranks = ranks.ALONE, **kwargs: Any):
        self.processes = processes
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

    def _share_of_step(self) -> float:
        """Of the rows of the step that runs, how many are this process's."""
        num_rows, at_most = len(self.train_dataset), self._rows_per_step
        before: int = self.state.global_step % math.ceil(num_rows / at_most) * at_most
        in_step = min(at_most, num_rows - before)
        return len(range(self.processes.rank, in_step, self.processes.size)) / in_step

    # A step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor
        if self.processes.is_alone:
            loss = super().training_step(model, inputs, num_items_in_batch)
            return loss
        self.share_of_step = self._share_of_step()
        logged, tokens = (
            {name: list(values) for name, values in self._metrics["train"].items()},
            self._total_train_tokens,
        )
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            is_stand_in, self.share_of_step = not self.share_of_step, 1.0
        if is_stand_in:
            self._metrics["train"].clear()
            self._metrics["train"].update(logged)
            self._total_train_tokens = tokens
        if self.accelerator.sync_gradients:
            self._sum_gradients()
        return loss

    def _sum_gradients(self) -> None:
        """Once a step, and whether a signal has come to one of the processes."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.stop:
            self.stop.agree()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Trained tokens of the whole step."""
        own = super()._get_num_items_in_batch(batch_samples, device)
        if self.processes.is_alone or own is None:
            return own
        [total] = self.processes.sum(int(own) if self._share_of_step() else 0)
        return torch.tensor(int(total), device=device)

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.processes.is_alone:
            for name in (
                "loss",
                "train_loss",
            ):  # each process has the sum over its own rows, as a share of the step
                if name in logs:
                    [logs[name]] = self.processes.sum(logs[name])
            mode = "train" if self.model.training else "eval"
            merged = merge(self.processes.gather(dict(self._metrics[mode])))
            self._metrics[mode].clear()
            self._metrics[mode].update(merged)
        super().log(logs, start_time)

    # Held-out rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batch by batch in turn, batched as one process would."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.processes.is_alone and self.splits_evaluation:
            size, (rank, num) = (
                self.args.per_device_eval_batch_size,
                (self.processes.rank, self.processes.size),
            )
            rows = rows.select([row for row in range(len(rows)) if row // size % num == rank])
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

    def _order_of_all(self, order: Any) -> Any:
        order.batch_size *= self.processes.size  # prompts of a step
        return order

    def _deal(self, step: list[int]) -> list[int]:
        own = len(step) // self.processes.size
        return step[self.processes.rank * own :][:own]

    def _share_of_step(self) -> float:
        return 1 / self.processes.size if self.averages_rows else 1.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        if "num_items_in_batch" in found and self.model.training and not self.processes.is_alone:
            [total] = self.processes.sum(
                float(found["num_items_in_batch"])
            )  # GRPO divides by the step's tokens
            found["num_items_in_batch"] = torch.full_like(found["num_items_in_batch"], int(total))
        return found


def merge(logged: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """What TRL would have kept between two logs, had one process run all micro-batches."""
    merged: dict[str, list[float]] = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(logged)):
        found = [one[name] for one in logged if one.get(name)]
        if name == "num_tokens":  # a running total, of each process its own
            merged[name] = [sum(values[-1] for values in found)]
        elif extreme := EXTREMES.get(name.rpartition("/")[2].partition("_")[0]):
            merged[name] = [extreme(values) for values in zip(*found, strict=False)]
        else:
            merged[name] = list(itertools.chain.from_iterable(found))
    return merged


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _rng_of(rank: int) -> str:
    return f"rng_state_{rank}.pth"
