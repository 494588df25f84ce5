"""Checkpoints that are complete or absent, and are proved so before they are trusted.

The Trainer's own checkpoint is written under a temporary name, sealed with the hashes of its files and renamed. A
checkpoint without its seal, or with a file that no longer matches it, is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from toolkit.engine.train import finite
from toolkit.recipe.schema import StageSection
from toolkit.recipe.stage_sections import Divergence
from toolkit.records.marks import Seal
from toolkit.run import manifest, sealing
from toolkit.run.rundir import PREFIX, RunDir, saved_steps
from toolkit.run.sealing import SEAL
from toolkit.training.divergence import good_until

STAGING = ".staging"  # where a checkpoint is written before it gets its name


class DurableCheckpoints:
    """Mixin for a Trainer: how its checkpoints reach the disk. The last `save_total_limit` stay, and the best one.

    A disk that is full costs the checkpoint, not the run: what was begun is removed, the last good one stays, and
    the next save tries again. `checkpoint_seconds`: how long each save took. `made` is what the weights are made by:
    each checkpoint says it itself, so that none continues under another recipe whatever becomes of the manifest.
    `divergence`: beyond which losses a checkpoint is no good one.
    """

    made: Seal = sealing.NOTHING_MORE
    divergence: Divergence | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.checkpoint_seconds: list[float] = []
        # The Trainer itself would prune by the files' times, and drop the last one for the best one at the end.
        self._num_kept = self.args.save_total_limit  # type: ignore[attr-defined]
        self.args.save_total_limit = None  # type: ignore[attr-defined]

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = folder / f"{PREFIX}{step}"
        if damage(checkpoint) is None:
            return  # a complete one is never replaced: it says the same
        finite.check_weights(self)
        started = time.perf_counter()
        try:
            with _staged(self.args) as staging:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                if self.state.best_global_step == step:
                    self.state.best_model_checkpoint = str(checkpoint)  # where it will be
                    self.state.save_to_json(str(staging / checkpoint.name / TRAINER_STATE_NAME))
                sealing.seal(staging / checkpoint.name, SEAL, self.made)
                sealing.put_in_place(staging / checkpoint.name, checkpoint)
        except Exception as error:
            problem = sealing.disk_problem(error)
            if problem is None:
                raise
            good = max(saved_steps(folder), default=None)
            self.recovery.console.print(
                f"[yellow]checkpoint at step {step} not saved ({escape(problem)}); "
                f"{'there is none yet' if good is None else f'the last good one is of step {good}'}; "
                "training goes on and the next save tries again[/]"
            )
            return
        self.checkpoint_seconds.append(time.perf_counter() - started)
        self._prune(folder)

    def _prune(self: Any, folder: Path) -> None:
        """Deletes all but the last ones up to this step, the best one, and while the loss is out of its range the last
        one before. Those of later steps were passed over as damaged; they are written anew when the run gets there."""
        reached = sorted(step for step in saved_steps(folder) if step <= self.state.global_step)
        until = good_until(self.state.log_history, self.divergence)
        good = max((step for step in reached if until is None or step <= until), default=None)
        for step in reached[: -self._num_kept]:
            if step not in (self.state.best_global_step, good):
                shutil.rmtree(folder / f"{PREFIX}{step}", ignore_errors=True)

    def _run_epoch(self: Any, **kwargs: Any) -> None:
        """An epoch, unless the checkpoint was the last of the run: the Trainer would train one step too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]


class CheckpointClock(TrainerCallback):
    """Checkpoints by minutes beside those by steps; how long each takes, and a warning when that is too long.

    Also puts right what resuming forgets: TRL would count tokens from 0 again, and the Trainer go on with the
    intervals of the first attempt.
    """

    def __init__(self, trainer: Any, section: StageSection, run: RunDir, started: float):
        self._trainer = trainer
        self._section = section
        self._run = run
        self._started = started
        self._last_save = started
        self._logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes = self._trainer.processes
        self._trainer._total_train_tokens = state.num_input_tokens_seen if processes.is_first else 0
        state.compute_steps(args, state.max_steps)
        self._last_save = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.num_input_tokens_seen = (
            self._trainer._total_train_tokens
        )  # the Trainer saves it, TRL's own it does not
        minutes = self._section.save_minutes
        if minutes is not None:
            is_due = time.monotonic() - self._last_save >= 60 * minutes
            control.should_save |= bool(self._trainer.processes.largest(is_due))  # no two clocks are one

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_save = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk has been told of
            self._run.record(
                manifest.noted(
                    self._run.begun_manifest(),
                    step=state.global_step,
                    seconds=self._last_save - self._started,
                )
            )
        saves, limit = self._trainer.checkpoint_seconds, self._section.save_within_seconds
        if saves and saves[-1] > limit and not any(seconds > limit for seconds in saves[:-1]):
            self._trainer.recovery.console.print(
                f"[yellow]the checkpoint of step {state.global_step} took {saves[-1]:.1f} s, more than "
                f"save_within_seconds {limit:g}: a host that gives less between SIGTERM and SIGKILL loses the "
                "steps since the one before; take --runs DIR on a faster disk, or a smaller lora.r[/]"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        saves = self._trainer.checkpoint_seconds[self._logged :]
        if saves:
            logs["checkpoint_seconds"] = max(saves)
            self._logged += len(saves)


@contextlib.contextmanager
def _staged(args: Any) -> Iterator[Path]:
    """The Trainer saves below `args.output_dir`; in the block that is an empty folder, which is gone afterwards."""
    folder = args.output_dir
    staging = Path(folder) / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    args.output_dir = str(staging)
    try:
        yield staging
    finally:
        args.output_dir = folder
        shutil.rmtree(staging, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a process left that was killed while it saved."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def latest(folder: Path, console: Console) -> Path | None:
    """The newest checkpoint that is complete; newer ones that are not are named and passed over."""
    for step in sorted(saved_steps(folder), reverse=True):
        checkpoint = folder / f"{PREFIX}{step}"
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        console.print(f"[yellow]checkpoint of step {step} is passed over: {escape(problem)}[/]")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None when nothing is."""
    return sealing.damage(checkpoint, SEAL)


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint was saved after; 0 for none."""
    return int(checkpoint.name.removeprefix(PREFIX)) if checkpoint else 0
