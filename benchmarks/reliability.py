"""Kills real runs at random moments and looks whether the same command ends with the same weights, bit for bit.

    python benchmarks/reliability.py [--kills 200] [--minutes 60] [--workers 2] [--seed 0] [--out results.json]

The command is what `make run` does: `run_sft.py && run_dpo.py` of the tiny recipe, few rows, a checkpoint every five
steps. Its whole process group gets SIGKILL, and the same command runs again, and is killed again, until it ends by
itself; then both adapters are compared with those of a run that nobody disturbed.

Moments: a third of the kills uniform over the seconds that the undisturbed command took, from its start on (most of
that is Python importing torch); a third each uniform over what SFT and DPO took after their imports, from the moment
that the stage began. One that has ended by then goes on undisturbed and is no kill.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft", "dpo")
SETTINGS = (
    "lora.lora_dropout=0.1",
    *(
        f"{stage}.{value}"
        for stage in STAGES
        for value in ("eval_datasets=[]", "eval_rows=8", "warmup_steps=0")
    ),
    *(f"{stage}.{value}" for stage in STAGES for value in ("logging_steps=1", "save_steps=5")),
    "sft.max_rows=104",
    "dpo.max_rows=56",
    "sft.max_steps=40",
    "dpo.max_steps=30",
)
LONGEST_SECONDS = 600  # a command that takes longer hangs
MOST_KILLS = 10  # of one run; then it may finish


def command(runs: Path) -> list[str]:
    options = ["--recipe", "tiny", "--runs", str(runs), *(w for value in SETTINGS for w in ("--set", value))]
    stages = [shlex.join([sys.executable, str(ROOT / f"run_{stage}.py"), *options]) for stage in STAGES]
    return ["sh", "-c", " && ".join(stages)]


@dataclass
class Kill:
    """One SIGKILL: in which phase, and how many logged steps of it had to be done again."""

    stage: str
    phase: str
    seconds: float
    last_step: int | None  # logged by this attempt
    steps_lost: int = 0


@dataclass
class Run:
    """One run directory: killed, continued, and in the end compared."""

    folder: Path
    kills: list[Kill] = field(default_factory=list)
    error: str | None = None
    equal: bool = False

    def manifest(self, stage: str) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return json.loads((self.folder / "tiny" / stage / "manifest.json").read_text())
        return {}

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        return self.manifest(stage).get("attempts", [])

    def last_step(self, stage: str) -> int | None:
        steps = []
        with contextlib.suppress(OSError):
            for line in (self.folder / "tiny" / stage / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    steps.append(json.loads(line)["step"])
        return max(steps, default=None)

    def weights(self) -> list[bytes]:
        files = (self.folder / "tiny" / stage / "adapter" / "adapter_model.safetensors" for stage in STAGES)
        return [file.read_bytes() for file in files]


class Attempt:
    """One process group that runs the command."""

    def __init__(self, run: Run, number: int):
        self.run = run
        self.before = {stage: len(run.attempts(stage)) for stage in STAGES}
        self.log = run.folder.with_name(f"{run.folder.name}-{number}.log")
        cache = {"XDG_CACHE_HOME": f"{run.folder}.cache"}  # of its own, so that preparing is killed as well
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                command(run.folder),
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | cache,
            )
        self.started = time.monotonic()

    def begun(self, stage: str) -> bool:
        return len(self.run.attempts(stage)) > self.before[stage]

    def ends_before(self, moment: float) -> bool:
        """Waits until `moment` (monotonic), or until it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, moment - time.monotonic()))
        return self.process.poll() is not None

    def ends_before_stage(self, stage: str) -> bool:
        while self.process.poll() is None and not self.begun(stage):
            time.sleep(0.02)
            if time.monotonic() - self.started > LONGEST_SECONDS:
                return False
        return self.process.poll() is not None

    def kill(self) -> Kill:
        seconds = time.monotonic() - self.started
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        stage = next((stage for stage in reversed(STAGES) if self.begun(stage)), None)
        if stage is None:
            return Kill(
                "dpo" if self.run.manifest("sft").get("outcome") == "finished" else "sft",
                "starting",
                seconds,
                None,
            )
        return Kill(stage, *self._phase(stage, seconds))

    def _phase(self, stage: str, seconds: float) -> tuple[str, float, int | None]:
        folder, of_run = self.run.folder / "tiny" / stage, self.run.manifest(stage)
        if of_run["outcome"] == "finished":
            return "finished, on its way out", seconds, None
        first, last = of_run["attempts"][-1]["from_step"], self.run.last_step(stage)
        # Lines of an earlier attempt go once the loop begins; with none beyond, this one has logged nothing yet.
        metrics = folder / "metrics.jsonl"
        fresh = (
            metrics.exists() and metrics.stat().st_mtime_ns > (folder / "data_report.json").stat().st_mtime_ns
        )
        step = last if fresh and last is not None and last > first else None
        if (folder / ".adapter.tmp").exists() or (folder / "adapter").exists():
            return "saving the adapter", seconds, step
        if (folder / "checkpoints" / ".staging").exists():
            return "writing a checkpoint", seconds, step
        if fresh:
            return "in the steps", seconds, step
        said = self.log.read_text(errors="replace")
        return ("reference pass" if "reference log-probs" in said else "loading"), seconds, None


class Trial:
    """All runs: draws the moments, counts the kills, compares."""

    def __init__(self, folder: Path, wanted: int, minutes: float, seed: int):
        self.folder = folder
        self.wanted = wanted
        self.deadline = time.monotonic() + 60 * minutes
        self.seed = seed
        self.given = 0
        self.lock = threading.Lock()
        self.runs: list[Run] = []

    @property
    def enough(self) -> bool:
        return self.given >= self.wanted or time.monotonic() > self.deadline

    def measure(self) -> None:
        """The undisturbed run: its weights, and the seconds that moments are drawn from."""
        self.whole = Run(self.folder / "whole")
        attempt = Attempt(self.whole, 0)
        if not attempt.ends_before(attempt.started + LONGEST_SECONDS) or attempt.process.returncode:
            sys.exit(attempt.log.read_text())
        self.seconds = time.monotonic() - attempt.started
        self.stage_seconds = {stage: self.whole.manifest(stage)["total_seconds"] for stage in STAGES}
        print(f"undisturbed: {self.seconds:.1f} s, after imports {self.stage_seconds}", flush=True)

    def work(self, worker: int) -> None:
        """Makes runs until enough kills were given."""
        number = 0
        while not self.enough:
            run = Run(self.folder / f"{worker}-{number}")
            self.one(run, random.Random(f"{self.seed} {worker} {number}"))
            with self.lock:
                self.runs.append(run)
                number += 1
                verdict = run.error or ("bitwise equal" if run.equal else "DIFFERENT")
                print(f"{self.given:>4} kills: {len(run.kills)} in this run, {verdict}", flush=True)

    def one(self, run: Run, dice: random.Random) -> None:
        """Kills and continues one run to its end."""
        while True:
            attempt = Attempt(run, len(run.kills))
            if not self.disturbed(attempt, dice):
                break
            with self.lock:
                self.given += 1
            run.kills.append(attempt.kill())
        for stage in STAGES:  # what each kill cost shows in where the next attempt began
            for kill, after in zip(
                [kill for kill in run.kills if kill.stage == stage and kill.phase != "starting"],
                run.attempts(stage)[1:],
                strict=False,
            ):
                kill.steps_lost = max(0, (kill.last_step or 0) - after["from_step"])
        if attempt.process.returncode:
            run.error = f"exit {attempt.process.returncode}: {attempt.log.read_text()[-2000:]}"
        else:
            run.equal = run.weights() == self.whole.weights()

    def disturbed(self, attempt: Attempt, dice: random.Random) -> bool:
        """Whether the moment to kill came before the command ended; waits for whichever is first."""
        if self.enough or len(attempt.run.kills) >= MOST_KILLS:
            if not attempt.ends_before(attempt.started + LONGEST_SECONDS):
                attempt.kill()
            return False
        left = [stage for stage in STAGES if attempt.run.manifest(stage).get("outcome") != "finished"]
        where = dice.choice(["anywhere", *left])
        if where == "anywhere":
            return not attempt.ends_before(attempt.started + dice.uniform(0, self.seconds))
        if attempt.ends_before_stage(where):
            return False
        return not attempt.ends_before(time.monotonic() + dice.uniform(0, self.stage_seconds[where]))

    def result(self) -> dict[str, Any]:
        kills = [kill for run in self.runs for kill in run.kills]
        training = [kill.steps_lost for kill in kills if kill.last_step is not None]
        return {
            "kills": len(kills),
            "runs": len(self.runs),
            "survived": sum(len(run.kills) for run in self.runs if run.error is None),
            "bitwise_equal": sum(len(run.kills) for run in self.runs if run.equal),
            "kills_while_training": len(training),
            "steps_lost_mean": statistics.mean(training) if training else None,
            "steps_lost_max": max(training, default=None),
            "steps_between_checkpoints": 5,
            "by_phase": dict(sorted(Counter(f"{kill.stage}: {kill.phase}" for kill in kills).items())),
            "undisturbed_seconds": self.seconds,
            "seed": self.seed,
            "errors": [run.error for run in self.runs if run.error],
            "different": [str(run.folder.name) for run in self.runs if not run.equal and not run.error],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after that many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), arguments.kills, arguments.minutes, arguments.seed)
        trial.measure()
        started = time.monotonic()
        with ThreadPoolExecutor(arguments.workers) as pool:
            for done in [pool.submit(trial.work, worker) for worker in range(arguments.workers)]:
                done.result()
        result = trial.result() | {"workers": arguments.workers, "minutes": (time.monotonic() - started) / 60}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(result["bitwise_equal"] != result["kills"])


if __name__ == "__main__":
    main()
