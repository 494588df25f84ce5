"""Runs a stage as its script does, with the batches counted by Unsloth, as they are on a GPU.

tests.engine.gpu_batches STAGE [the script's options]
"""

import importlib
import sys
from typing import Any

from toolkit import cli


def main() -> None:
    stage = sys.argv.pop(1)
    job = cli.start(stage, "")  # type: ignore[arg-type]
    assert job is not None
    engine: Any = importlib.import_module(f"toolkit.engine.train.{stage}")

    from transformers import Trainer
    from unsloth_zoo.loss_utils import _unsloth_get_batch_samples

    Trainer.get_batch_samples = _unsloth_get_batch_samples
    cli.finish(engine.run(job), job)


if __name__ == "__main__":
    cli.run(main)
