"""Runs a stage as its script does, and sends itself signals at the n-th call of a function.

    tests.engine.killed MODULE:FUNCTION N SIGNAL[,SIGNAL] STAGE [the script's options]

A kill from outside at a moment that can be named: nothing of the run is replaced.
"""

import importlib
import os
import signal
import sys
from typing import Any

from toolkit import cli


def main() -> None:
    place, calls, signals, stage = sys.argv[1:5]
    sys.argv[1:5] = []
    job = cli.start(stage, "")  # type: ignore[arg-type]
    assert job is not None, "the run is finished already"
    engine: Any = importlib.import_module(f"toolkit.engine.train.{stage}")
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for inner in owners:
        owner = getattr(owner, inner)
    function, left = getattr(owner, name), int(calls)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            for number in signals.split(","):
                os.kill(os.getpid(), signal.Signals[number])
        return function(*args, **kwargs)

    setattr(owner, name, call)
    cli.finish(engine.run(job), job)


if __name__ == "__main__":
    cli.run(main)
