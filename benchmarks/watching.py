"""What watching costs a step: metrics, panel, timeline, checkpoint clock and signals, against the same trainer without.

    python benchmarks/watching.py [--stage sft] [--steps 400] [--block 10] [--out results.json]

One real run of the tiny recipe in one process; our callbacks are taken out and put back every `--block` steps, so
that both sides see the same model, rows and machine. Prints the ratio of the median seconds a step, and of the mean
(a line is logged only every few steps, which a median does not see). Aim: at most 1.02.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit import env, hardware
from toolkit.console.screen import Screen
from toolkit.memory.plan import plan_stage
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

LOGGING_STEPS = 5  # as often as the large recipes, whose steps are a hundred times as long


class Nowhere(io.StringIO):
    """A terminal that nobody looks at."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def measure(stage: str, steps: int, block: int) -> dict[str, list[float]]:
    """Seconds of each step, with our callbacks ("on") and without ("off")."""
    env.prepare("expandable_segments:True", hardware.here().gpu is not None)
    from toolkit.engine.train import dpo, interrupt, sft

    from transformers import TrainerCallback  # isort: skip

    seconds: dict[str, list[float]] = {"on": [], "off": []}

    class Toggle(TrainerCallback):
        def __init__(self, trainer: Any):
            self.handler = trainer.callback_handler
            self.all = [*self.handler.callbacks, self]
            self.bare = [each for each in self.all if not type(each).__module__.startswith("toolkit.")]
            self.last = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now, step = time.perf_counter(), state.global_step
            if (
                self.last is not None and step % block != 1
            ):  # the first of a block pays for the log of the one before
                seconds["on" if self.handler.callbacks is self.all else "off"].append(now - self.last)
            if step % block == 0:
                watched = bool(step // block % 2)
                self.handler.callbacks = self.all if watched else self.bare
                for panel in filter(None, (getattr(each, "_live", None) for each in self.all)):
                    panel.start() if watched else panel.stop()  # its thread draws beside the steps
            self.last = time.perf_counter()

    train = interrupt.StopOnSignal.train

    def toggled(self: Any, trainer: Any, checkpoint: str | None) -> None:
        trainer.callback_handler.callbacks.append(Toggle(trainer))
        train(self, trainer, checkpoint)

    interrupt.StopOnSignal.train = toggled  # type: ignore[method-assign]
    settings = [f"{stage}.max_steps={steps}", f"{stage}.logging_steps={LOGGING_STEPS}"]
    settings += [f"{stage}.save_steps=100000", f"{stage}.eval_datasets=[]"]
    recipe = load("tiny", (*settings, *(["sft=null"] if stage == "dpo" else [])))
    with tempfile.TemporaryDirectory() as folder:
        console = Screen(file=Nowhere(), force_terminal=True, width=100, height=40)
        job = Job(recipe, plan_stage(recipe, stage, None, 16), RunDir(Path(folder), "tiny", stage), console)
        (dpo if stage == "dpo" else sft).run(job)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds = measure(arguments.stage, arguments.steps, arguments.block)
    result = {
        "stage": arguments.stage,
        "steps": {side: len(values) for side, values in seconds.items()},
        "median_seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "ratio_of_medians": statistics.median(seconds["on"]) / statistics.median(seconds["off"]),
        "ratio_of_means": statistics.mean(seconds["on"]) / statistics.mean(seconds["off"]),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
