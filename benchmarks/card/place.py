"""Where the measurements take place: the sizes, the folder they work in, the card, and the scripts they start."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from benchmarks.card import figures, held, rows
from benchmarks.card.results import Clock
from toolkit import hardware
from toolkit.hardware import CARDS, Card
from toolkit.memory import terms
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_IN = CARDS["rtx4090"]  # what a larger card is held down to
# What Unsloth makes of the card's total memory, which no second process lowers: up to 24.5 GiB its fused head works in
# tiles (unsloth_zoo fused_losses/fused_linear.py, _flash_min_rows).
AS_ON_24_GIB = {"UNSLOTH_FUSED_LINEAR_FLASH_MIN_ROWS": "0"}
END_SECONDS = 10  # for a process to end once it was told to
LAST_WORDS = 2000  # characters of what a failed script said


class Failed(Exception):
    """What a script or the worker said when it failed; that point has no figures."""


class OutOfTime(Failed):
    """The clock ran out in the middle of a point: the next start measures it, with as much time as it now has told."""

    def __init__(self) -> None:
        super().__init__("the clock ran out before it was done")


def is_larger(gpu: hardware.Gpu | None) -> bool:
    """Than the stand-in, by more than cards of one kind differ."""
    return gpu is not None and gpu.total_gib > STAND_IN.total_gib + 2


@dataclass(frozen=True)
class Size:
    """How much is measured. `steps` of a timed run; memory `points` are (stage, packed, kept layers, rows, tokens a
    row, loss chunk in GiB), `point_steps` long. `without` are points that are left out, (measurement, point)."""

    name: str
    recipe: str
    settings: tuple[str, ...]  # of the runs on the random base
    scripts: tuple[str, ...]  # of the embedded recipe
    steps: int
    points: tuple[tuple[str, bool, int, int, int, float], ...]
    point_steps: int
    without: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Run:
    """One start of run_sft.py or run_dpo.py on the random base; `leave_gib` of the card are left to it."""

    name: str
    stage: str
    settings: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    leave_gib: float | None = None


@dataclass
class Place:
    """`work` is of these results alone but for the random base, which lies beside it."""

    size: Size
    work: Path
    clock: Clock
    gpu: hardware.Gpu | None

    @classmethod
    @contextlib.contextmanager
    def of(cls, size: Size, work: Path, clock: Clock, gpu: hardware.Gpu | None) -> Iterator[Place]:
        """A larger card is held down to the stand-in's memory meanwhile."""
        place = cls(size, work, clock, gpu)
        work.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as until_done:
            if place.is_held:
                until_done.enter_context(held.leaving(STAND_IN.total_gib))
            until_done.callback(place._close_worker)
            yield place

    @property
    def is_held(self) -> bool:
        return is_larger(self.gpu)

    @property
    def card(self) -> Card | None:
        """The card that is planned for."""
        return STAND_IN if self.is_held else self.gpu and self.gpu.card

    # The recipe on the random base

    @cached_property
    def base(self) -> Path:
        """A base with the recipe's architecture and random NF4 weights, made once."""
        folder = self.work.parent / f"base-{self.size.recipe}"
        if not folder.is_dir():
            self._finished([ROOT / "benchmarks/card/random_base.py", self.size.recipe, folder])
        return folder

    def recipe(self, stage: str, *settings: str) -> Recipe:
        return load(self.size.recipe, (*self._overrides(stage), *settings))

    def _overrides(self, stage: str) -> list[str]:
        """Another base and other rows; no evaluation and no checkpoints, a log every step; one stage alone."""
        own = {
            f"{stage}.datasets": [{"path": str(self._rows / f"{stage}.jsonl")}],
            f"{stage}.eval_datasets": [],
            f"{stage}.eval_rows": 0,
            f"{stage}.eval_steps": None,
            f"{stage}.max_rows": None,
            f"{stage}.max_steps": self.size.steps,
            f"{stage}.warmup_steps": 0,
            f"{stage}.logging_steps": 1,
            f"{stage}.save_steps": 10_000,
            f"{stage}.save_minutes": None,
            "model.path": str(self.base),
            "model.revision": None,
            "model.base_16bit": None,
            "compare.max_new_tokens": 4,
        }
        if self.is_held:
            budget = STAND_IN.total_gib - terms.CONTEXT_GIB - terms.RESERVE_GIB
            own["memory.budget_gib"] = budget
        alone = ["sft=null"] if stage == "dpo" else ["dpo=null"]
        return [*self.size.settings, *(f"{key}={json.dumps(value)}" for key, value in own.items()), *alone]

    @cached_property
    def _rows(self) -> Path:
        folder = self.work / "rows"
        if not folder.is_dir():
            shipped = load(
                self.size.recipe, (*self.size.settings, f"model.path={json.dumps(str(self.base))}")
            )
            made = self.work / ".rows.tmp"
            made.mkdir(exist_ok=True)
            effective = {stage: shipped.section(stage).effective_batch_size for stage in ("sft", "dpo")}
            per_sequence = 5 if shipped.sft and shipped.sft.packing else 1
            rows.write(
                shipped,
                made,
                num_chats=self.size.steps * effective["sft"] * per_sequence,
                num_pairs=self.size.steps * effective["dpo"],
            )
            made.rename(folder)
        return folder

    def plan(self, stage: str, *settings: str) -> Plan:
        return plan_stage(self.recipe(stage, *settings), stage, self.card, hardware.here().ram_gib)

    # What is started

    def folder(self, run: Run) -> Path:
        return self.work / "runs" / run.name

    def output(self, run: Run) -> Path:
        return self.folder(run) / self.size.recipe / run.stage

    def command(self, run: Run) -> list[str | Path]:
        settings = [*self._overrides(run.stage), *run.settings]
        words = [word for setting in settings for word in ("--set", setting)]
        script = ROOT / f"run_{run.stage}.py"
        return [script, "--recipe", self.size.recipe, "--runs", self.folder(run), *words]

    def run(self, run: Run, goes_on: bool = False) -> dict[str, Any]:
        """The figures of a run: of the one that is there, or made anew; half a run tells no speed."""
        folder = self.output(run)
        if not figures.is_finished(folder):
            self._close_worker()  # before memory is held: its model lies on the card
            if not goes_on:
                shutil.rmtree(self.folder(run), ignore_errors=True)
            with self.left_to(run):
                self._finished(self.command(run), run.variables)
        return figures.of(folder)

    def stop(self, run: Run, when: Callable[[], bool]) -> None:
        """Starts a run anew and ends it by SIGTERM once `when` holds. Raises Failed when something else ended it."""
        shutil.rmtree(self.folder(run), ignore_errors=True)
        self._close_worker()
        process = self.start(self.command(run), run.variables)
        try:
            while not when() and process.poll() is None:
                if not self.clock.left():
                    raise OutOfTime
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            code = self.wait(process)
        finally:
            end(process)
        if code != 128 + signal.SIGTERM:
            raise Failed(f"stopped by SIGTERM, exit code {code}: {self.said.read_text()[-LAST_WORDS:]}")

    @contextlib.contextmanager
    def left_to(self, run: Run) -> Iterator[None]:
        """So much of the card's memory as the run says, if there is a card."""
        if self.gpu is None or run.leave_gib is None:
            yield
            return
        with held.leaving(run.leave_gib):
            yield

    def embedded(self, script: str) -> Path:
        """Runs a script of the embedded recipe, as the README has it. Returns where it wrote."""
        runs = self.work / "runs" / "embedded"
        words = [word for setting in self.size.scripts for word in ("--set", setting)]
        self._finished([ROOT / f"run_{script}.py", "--recipe", "tiny", "--runs", runs, *words])
        return runs / "tiny" / script

    def stock(self, stage: str, name: str) -> dict[str, Any]:
        """The figures of the stock script over the same rows."""
        recipe, out = self.recipe(stage), self.work / f"{name}.json"
        section = recipe.section(stage)
        self._finished(
            [
                ROOT / "benchmarks/card/stock.py",
                *(stage, self.base, self._rows / f"stock_{stage}.jsonl", section.max_length),
                *(section.effective_batch_size, self.size.steps, getattr(section, "packing", False)),
                *(recipe.template.pad_token, out),
            ]
        )
        return json.loads(out.read_text())  # type: ignore[no-any-return]

    def start(self, command: list[Any], variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A Python script with this machine's environment; what it says goes to a file."""
        self.said.parent.mkdir(parents=True, exist_ok=True)
        with self.said.open("w") as said:
            return subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=self._environment(variables),
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )

    @property
    def said(self) -> Path:
        return self.work / "last.log"

    def wait(self, process: subprocess.Popen[str]) -> int:
        """Its exit code. Raises OutOfTime when the clock has run out, and ends it."""
        try:
            return process.wait(self.clock.left())
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            end(process)

    def _finished(self, command: list[Any], variables: Mapping[str, str] | None = None) -> None:
        """Waits for a script that must succeed; the worker's model leaves the card before it."""
        self._close_worker()
        code = self.wait(self.start(command, variables))
        if code:
            raise Failed(f"{Path(command[0]).name}, exit code {code}: {self.said.read_text()[-LAST_WORDS:]}")

    def _environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        pinned = AS_ON_24_GIB if self.is_held else {}
        cache = {"XDG_CACHE_HOME": str(self.work / "cache"), "COLUMNS": "200"}
        return os.environ | cache | pinned | dict(variables or {})

    # The worker: a process with the loaded model, for what needs no process of its own

    _worker: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the worker answers. Raises Failed with its words, OutOfTime when the clock runs out."""
        worker = self._worker or self._start_worker()
        assert worker.stdin and worker.stdout
        guard = threading.Timer(self.clock.left(), worker.kill)
        guard.start()
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            guard.cancel()
        if not line:
            self._close_worker()
            if not self.clock.left():
                raise OutOfTime
            raise Failed(f"the worker ended: {self.said.read_text()[-LAST_WORDS:]}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _start_worker(self) -> subprocess.Popen[str]:
        said: IO[str]
        with self.said.open("w") as said:
            self._worker = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks/card/trials.py"), self.size.recipe, str(self.base)],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        return self._worker

    def _close_worker(self) -> None:
        if self._worker is not None:
            end(self._worker)
            self._worker = None


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process that still runs."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
