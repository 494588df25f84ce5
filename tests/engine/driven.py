"""Runs a stage as its script does, in other circumstances than a CPU has by itself.

tests.engine.driven CIRCUMSTANCE[,CIRCUMSTANCE] STAGE [the script's options]

float32       the model in 32 bits: only an error of ours is left to see where sums are rounded otherwise
gpu_batches   Unsloth counts the trained tokens of a step, as it does on a GPU
scarce:N      memory for N rows at once: a forward pass of more runs out of it
"""

import importlib
import sys
from contextlib import ExitStack
from typing import Any

from toolkit import cli


def main() -> None:
    circumstances, stage = sys.argv[1:3]
    sys.argv[1:3] = []
    job = cli.start(stage, "")  # type: ignore[arg-type]
    assert job is not None, "the run is finished already"
    engine: Any = importlib.import_module(f"toolkit.engine.train.{stage}")
    with ExitStack() as until_done:
        for circumstance in circumstances.split(","):
            name, _, value = circumstance.partition(":")
            if name == "float32":
                until_done.enter_context(float32())
            elif name == "gpu_batches":
                gpu_batches()
            else:
                scarce(int(value))
        cli.finish(engine.run(job), job)


def float32() -> Any:
    from tests.engine import conftest

    return conftest.float32()


def gpu_batches() -> None:
    from transformers import Trainer
    from unsloth_zoo.loss_utils import _unsloth_get_batch_samples

    Trainer.get_batch_samples = _unsloth_get_batch_samples


def scarce(rows: int) -> None:
    import torch

    from toolkit.engine.train.pieces import OutOfMemoryRecovery

    compute_loss = OutOfMemoryRecovery.compute_loss

    def limited(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training and len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return compute_loss(self, model, inputs, *args, **kwargs)

    OutOfMemoryRecovery.compute_loss = limited  # type: ignore[method-assign]


if __name__ == "__main__":
    cli.run(main)
