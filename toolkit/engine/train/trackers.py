"""TensorBoard and W&B through the Trainer's own callbacks: where they write, and that a resumed run goes on there."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from toolkit.engine.train.checkpoints import step_of
from toolkit.errors import UserError
from toolkit.redaction import blanked
from toolkit.training.job import Job

TENSORBOARD = "tensorboard"  # in the run directory; W&B makes its own `wandb` there


@contextlib.contextmanager
def attached(trainer: Any, job: Job, checkpoint: Path | None) -> Iterator[None]:
    """Lets the trainer's reporters write into the run directory, and closes them however the block ends.

    They move behind the callbacks that the trainer has, so that they see what those add to a log. Raises UserError
    when W&B cannot begin.
    """
    with contextlib.ExitStack() as stack:
        if not job.world.is_first:
            for callback in (TensorBoardCallback, WandbCallback):
                trainer.remove_callback(callback)
            yield
            return
        if "tensorboard" in job.section.report_to:
            stack.enter_context(_tensorboard(trainer, job.run.path / TENSORBOARD, checkpoint))
        if "wandb" in job.section.report_to:
            stack.enter_context(_wandb(trainer, job))
        yield


@contextlib.contextmanager
def _tensorboard(trainer: Any, folder: Path, checkpoint: Path | None) -> Iterator[None]:
    from torch.utils.tensorboard import SummaryWriter

    callback = trainer.pop_callback(TensorBoardCallback)
    callback.logging_dir = str(folder)
    # Steps that a killed run logged behind its checkpoint are done again: TensorBoard forgets the first ones.
    purge = step_of(checkpoint) + 1 if checkpoint else None
    callback.tb_writer = SummaryWriter(str(folder), purge_step=purge)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        if (
            callback.tb_writer is not None
        ):  # the Trainer closes it when training ends; an evaluation opens it again
            callback.tb_writer.close()


@contextlib.contextmanager
def _wandb(trainer: Any, job: Job) -> Iterator[None]:
    import wandb

    identity = job.run.read_manifest().wandb_run or uuid.uuid4().hex[:8]
    job.run.record({"wandb_run": identity})
    try:
        run = wandb.init(
            project=job.recipe.name,
            name=f"{job.recipe.name}-{job.run.name}",
            id=identity,
            resume="allow",
            dir=str(job.run.path),
            config={"recipe": blanked(job.recipe.model_dump(mode="json", by_alias=True))},
            # Not what our manifest has already, with secrets blanked out: W&B takes the command line as it is.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, save_code=False),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B cannot begin ({error}): set WANDB_MODE=offline and `wandb sync` the run later, or "
            f"--set {job.stage.name}.report_to=[]"
        ) from None
    trainer.add_callback(trainer.pop_callback(WandbCallback))
    failed = 1
    try:
        yield
        failed = 0
    finally:
        run.finish(exit_code=failed)
