"""Real Unsloth on the tiny model, a few steps at a time."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock
from rich.console import Console

from tests.conftest import ROOT
from tests.engine.scripts import Script
from toolkit.memory.plan import plan_stage
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.records.record import Record, plain
from toolkit.records.run_report import RunReport
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

Read = TypeVar("Read", bound=Record)

FEW_ROWS = (
    "sft.max_rows=64",
    "sft.num_train_epochs=1",
    "sft.warmup_steps=0",
    "dpo.max_rows=24",
    "dpo.warmup_steps=0",
    "kto.max_rows=24",
    "kto.warmup_steps=0",
    "kto.logging_steps=1",
    "reward.max_rows=24",
    "reward.warmup_steps=0",
    "reward.logging_steps=1",
    "sft.logging_steps=1",
    "dpo.logging_steps=1",
    "compare.max_new_tokens=8",  # of the answers before and after that every stage ends with
)

# Short runs with checkpoints; SFT's epoch has 4 steps and DPO's 3: both end in the middle of one.
STEPS = (
    "sft.max_steps=7",
    "dpo.max_steps=5",
    "sft.save_steps=3",
    "dpo.save_steps=2",
    "lora.lora_dropout=0.1",
    "sft.eval_datasets=[]",
    "sft.eval_rows=8",
    "sft.max_rows=72",
    "dpo.eval_datasets=[]",
    "dpo.eval_rows=8",
    "dpo.max_rows=32",
)


def tiny(*overrides: str) -> Recipe:
    return load("tiny", (*FEW_ROWS, *overrides))


@dataclass
class Stage:
    """A finished stage: what its report.json holds, and what it showed."""

    recipe: Recipe
    run: RunDir
    report: dict[str, Any]
    shown: str = field(repr=False)


def held_out_pairs(recipe: Recipe, loaded: Any) -> list[Any]:
    from toolkit.engine.data import preparation

    return preparation.as_pairs(preparation.held_out(recipe, recipe.dpo, "pair", loaded) or ())


def run_stage(
    recipe: Recipe,
    stage: str,
    runs: Path,
    console: Console | None = None,
    name: str | None = None,
    from_: str | None = None,
) -> Stage:
    import importlib

    engine: Any = importlib.import_module(f"toolkit.engine.train.{stage}")
    run = RunDir(runs, recipe.name, stages.variant(stage, name))
    console = console or Console(record=True, width=200, quiet=False)
    job = Job(recipe, plan_stage(recipe, stage, None, 16), run, console, from_=from_)
    report: RunReport = engine.run(job)
    return Stage(recipe, run, plain(report), shown_by(console))


def shown_by(console: Console) -> str:
    return " ".join(console.export_text(clear=False).split()) if console.record else ""


Made = TypeVar("Made")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` returns for a folder of that name: of all workers of a test run the first one makes it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.pickle"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(made.read_bytes())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One SFT run that the tests share; nobody writes into its directory."""
    return once(tmp_path_factory, "shared-sft", lambda runs: run_stage(tiny(), "sft", runs))


@pytest.fixture(scope="session")
def dpo(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One DPO run from it that the tests share, at a learning rate that changes answers within its few steps."""

    def train(runs: Path) -> Stage:
        (runs / "tiny").mkdir()
        (runs / "tiny" / "sft").symlink_to(sft.run.path)
        return run_stage(tiny("dpo.learning_rate=5e-3"), "dpo", runs)

    return once(tmp_path_factory, "shared-dpo", train)


@pytest.fixture
def runs_with_sft(sft: Stage, tmp_path: Path) -> Path:
    """A runs directory of one's own that holds the shared SFT run."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "sft").symlink_to(sft.run.path)
    return tmp_path


def as_written(kind: type[Read], file: Path) -> Read:
    """A file as its type reads it: nothing in it is unknown, missing, or of another kind."""
    notes: list[str] = []
    record = kind.load(file, notes)
    assert record is not None and notes == []
    assert plain(record) == json.loads(file.read_text())
    return record


def weights(stage: Stage | Path) -> bytes:
    folder = stage.run.adapter if isinstance(stage, Stage) else stage / "adapter"
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of `STEPS`, undisturbed; nobody writes into them."""

    def train(runs: Path) -> Path:
        for name in ("sft", "dpo"):
            run_stage(tiny(*STEPS), name, runs)
        return runs / "tiny"

    return once(tmp_path_factory, "shared-steps", train)


@contextmanager
def float32() -> Iterator[None]:
    """Models that are loaded in the block compute in 32 bits.

    A piece's matrices have other shapes, so bf16 rounds them otherwise, and Adam's first steps follow signs: at lr 2e-3
    that alone is 8e-3 of the weights. In float32 only an internal error is left to see.
    """
    import torch

    from toolkit.engine.base import model, score_head
    from toolkit.training import trainer_args

    def in_32_bits(load: Any) -> Any:
        return lambda **kwargs: load(**kwargs | {"dtype": torch.float32})

    answers, scores, config = model.FastLanguageModel, score_head, trainer_args._common
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "from_pretrained", staticmethod(in_32_bits(answers.from_pretrained)))
        patch.setattr(scores, "from_pretrained", in_32_bits(scores.from_pretrained))
        patch.setattr(trainer_args, "_common", lambda *args: config(*args) | {"bf16": False})
        yield


@contextmanager
def stopped_in_the_fourth_step() -> Iterator[None]:
    """A run in the block breaks off there, with three steps done."""
    from toolkit.engine.train.pieces import OutOfMemoryRecovery

    class Stop(Exception):
        pass

    step = OutOfMemoryRecovery.training_step

    def stop_in_the_fourth(self: Any, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise Stop
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(OutOfMemoryRecovery, "training_step", stop_in_the_fourth)
        yield


def start(name: str, runs: Path, *overrides: str) -> Script:
    """A script of the tiny recipe in a process of its own."""
    words = [word for override in (*FEW_ROWS, *overrides) for word in ("--set", override)]
    words = [str(ROOT / f"run_{name}.py"), "--recipe", "tiny", "--runs", str(runs), *words]
    runs.mkdir(exist_ok=True)
    return Script(words, runs / f"{name}.said")


def wait_for(script: Script, happened: Callable[[], bool]) -> None:
    """Until something happened, or a failure when the script ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert script.poll() is None, script.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)
