"""Runs a stage as its script does, with memory for so many rows at once: a forward pass of more runs out of it.

tests.engine.scarce ROWS STAGE [the script's options]
"""

import importlib
import sys
from typing import Any

from toolkit import cli


def main() -> None:
    rows, stage = sys.argv[1:3]
    sys.argv[1:3] = []
    job = cli.start(stage, "")  # type: ignore[arg-type]
    assert job is not None
    import torch

    from toolkit.engine.train.pieces import OutOfMemoryRecovery

    engine: Any = importlib.import_module(f"toolkit.engine.train.{stage}")
    compute_loss = OutOfMemoryRecovery.compute_loss

    def limited(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training and len(inputs["input_ids"]) > int(rows):
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return compute_loss(self, model, inputs, *args, **kwargs)

    OutOfMemoryRecovery.compute_loss = limited  # type: ignore[method-assign]
    cli.finish(engine.run(job), job)


if __name__ == "__main__":
    cli.run(main)
