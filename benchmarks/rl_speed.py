"""Completions a second of learning from rewards, over TRL's stock trainer on the same model, prompts and rewards.

    python benchmarks/rl_speed.py --runs runs --rounds 3

Needs runs/tiny/sft. Alternates: a round of ours, a round of the stock one; both warm, without loading. Prints one
JSON line a round, then the medians and the shares of generation, scoring and step of ours. Without a GPU the rates are
of the process's own CPU seconds: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit import env, hardware
from toolkit.memory.plan import plan_stage
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

WARM = 1
VALUES = ("dpo=null", "rl.eval_datasets=[]", "rl.max_steps=4", "rl.algorithm=grpo", "rl.beta=0.0")


class Built(Exception):
    """Carries the trainer out of `stage.run`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recipe = load("tiny", VALUES)
    env.prepare(recipe.memory.alloc_conf, use_gpu=hardware.here().gpu is not None)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    for _ in range(arguments.rounds):
        for name, run in (("ours", ours), ("stock", stock)):
            found = run(recipe, Path(arguments.runs))
            rounds[name].append(found)
            print(json.dumps({"round": len(rounds[name]), "of": name, **found}), flush=True)
    rate = "completions_per_cpu_second" if hardware.here().gpu is None else "completions_per_second"
    medians = {name: statistics.median(one[rate] for one in found) for name, found in rounds.items()}
    keys = ("generation", "scoring", "step")
    shares = {key: statistics.median(one[key] for one in rounds["ours"]) for key in keys}
    print(json.dumps({rate: medians, "ratio": medians["ours"] / medians["stock"], **shares}))


def ours(recipe: Any, runs: Path) -> dict[str, float]:
    trainer = _built(recipe, runs, stock_kind=False)
    found = _timed(trainer)
    seconds = {key: sum(log_of(trainer, f"seconds/{key}")) for key in ("generation", "scoring")}
    total = found["seconds_of_run"]
    step = max(0.0, total - sum(seconds.values()))
    return found | {key: value / total for key, value in (seconds | {"step": step}).items()}


def stock(recipe: Any, runs: Path) -> dict[str, float]:
    return _timed(_built(recipe, runs, stock_kind=True))


def log_of(trainer: Any, name: str) -> list[float]:
    """A name's values in the Trainer's log, without those of the warm-up."""
    return [entry[name] for entry in trainer.state.log_history if name in entry and entry["step"] > WARM]


def _built(recipe: Any, runs: Path, stock_kind: bool) -> Any:
    from rich.console import Console
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from toolkit.engine.base import model
    from toolkit.engine.train import rl, stage

    def take(job: Any, loaded: Any, prepared: Any) -> None:
        trainer = rl.build(job, loaded, prepared)
        if stock_kind:
            rows = prepared.train.to_list()
            plain = GRPOTrainer(
                model=loaded.model,
                reward_funcs=list(trainer.reward_funcs),
                args=trainer.args,
                train_dataset=prepared.train.from_list(rl_rows(rows)),
                processing_class=loaded.tokenizer,
            )
            for parameter in model.trainable(plain.model):
                parameter.data = parameter.data.float()
            trainer = plain
        trainer.remove_callback(PrinterCallback)
        raise Built(trainer)

    def rl_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from toolkit.engine.train.rollout import as_examples

        return as_examples(rows)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").mkdir()
        (Path(folder) / "tiny" / "sft").symlink_to((runs / "tiny" / "sft").resolve())
        job = Job(
            recipe,
            plan_stage(recipe, "rl", None, 16.0),
            RunDir(Path(folder), "tiny", "rl"),
            Console(quiet=True),
        )
        try:
            stage.run(job, take)  # type: ignore[arg-type]
        except Built as built:
            return built.args[0]
    raise AssertionError("stage.run built no trainer")


def _timed(trainer: Any) -> dict[str, float]:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun = ended = (0.0, 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Clock.ended = (time.perf_counter(), time.process_time())
            if state.global_step == WARM:
                Clock.begun = Clock.ended
            control.should_save = False

    trainer.add_callback(Clock())
    trainer.args.save_strategy = "no"
    trainer.train()
    seconds, of_cpu = (ended - begun for ended, begun in zip(Clock.ended, Clock.begun, strict=True))
    num = (trainer.state.global_step - WARM) * trainer.args.generation_batch_size
    return {
        "completions_per_second": num / seconds,
        "completions_per_cpu_second": num / of_cpu,
        "seconds_of_run": seconds,
    }


if __name__ == "__main__":
    main()
