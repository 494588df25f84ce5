"""Runs of a sweep share one loaded model, and come out as if each had been alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS, run_stage, tiny, wait_for
from toolkit.engine.base import model
from toolkit.engine.reference import precompute
from toolkit.engine.train import sweep
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

STEPS = ("dpo.max_steps=3", "dpo.beta=0.3")


def job(runs: Path, name: str, *overrides: str) -> Job:
    recipe = tiny(*STEPS, *overrides)
    return Job(recipe, plan_stage(recipe, "dpo", None, 16), RunDir(runs, "tiny", name), Console(quiet=True))


def test_a_run_of_a_sweep_is_the_single_run_bit_for_bit_with_one_load_and_no_log_prob_twice(
    runs_with_sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loads, batches = [], []
    load, next_batch = model.load, precompute._next_batch

    def count_load(*args: Any, **kwargs: Any) -> Any:
        loads.append(1)
        return load(*args, **kwargs)

    def count_batch(*args: Any) -> Any:
        batches.append(1)
        return next_batch(*args)

    monkeypatch.setattr(model, "load", count_load)
    monkeypatch.setattr(precompute, "_next_batch", count_batch)
    jobs = [
        job(runs_with_sft, "dpo-other", "seed=1", "dpo.beta=0.1"),
        job(runs_with_sft, "dpo-same", "seed=2"),
    ]
    told: list[int] = []
    assert sweep.run(jobs, Console(quiet=True), lambda failed: told.append(len(batches))) == {}
    assert len(loads) == 1
    assert told[0] > 0 and told[1] == told[0], "the second run computed no log-prob of the reference"

    alone = run_stage(tiny(*STEPS, "seed=2"), "dpo", runs_with_sft, name="alone")
    together = jobs[1].run
    files = sorted(path.name for path in alone.run.adapter.iterdir())
    assert files == sorted(path.name for path in together.adapter.iterdir())
    for name in files:
        assert (alone.run.adapter / name).read_bytes() == (together.adapter / name).read_bytes(), name
    assert losses(alone.run) == losses(together) != losses(jobs[0].run)
    answers = [(run.path / "answers.jsonl").read_text() for run in (alone.run, together)]
    assert answers[0] == answers[1]


def test_a_run_that_fails_ends_no_other(runs_with_sft: Path) -> None:
    good = job(runs_with_sft, "dpo-good", "dpo.max_steps=1")
    jobs = [job(runs_with_sft, "dpo-bad", "dpo.learning_rate=1e30", "dpo.max_steps=2"), good]
    told: list[dict[str, str]] = []
    failed = sweep.run(jobs, Console(quiet=True), lambda failed: told.append(dict(failed)))
    assert list(failed) == ["dpo-bad"] and good.run.finished_with() is not None
    assert told == [failed, failed], "after each of them"


def losses(run: RunDir) -> list[float]:
    entries = map(json.loads, run.metrics.read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.long
def test_killed_and_started_again_a_sweep_ends_as_an_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "sft", tmp_path / "tiny" / "sft")
    made = [
        f"dpo.{key}"
        for key in ("max_steps=5", "save_steps=1", "eval_datasets=[]", "eval_rows=8", "max_rows=32")
    ]
    made += [
        "lora.lora_dropout=0.1",
        "sft.max_steps=7",
        "sft.save_steps=3",
        "sft.eval_datasets=[]",
        "sft.eval_rows=8",
    ]
    made += ["sft.max_rows=72"]
    words = ("--stage", "dpo", "--vary", "dpo.beta=0.2,0.1")
    command = [
        sys.executable,
        str(ROOT / "run_sweep.py"),
        "--recipe",
        "tiny",
        "--runs",
        str(tmp_path),
        *words,
    ]
    command += [word for override in (*FEW_ROWS, *made) for word in ("--set", override)]
    second = tmp_path / "tiny" / "dpo-beta0p1"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(process, lambda: any(second.glob("checkpoints/checkpoint-*/sealed.json")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = (tmp_path / "tiny" / "dpo-beta0p2" / "adapter" / "complete.json").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1: dpo-beta0p1" in done.stdout and "continuing at step" in done.stdout
    assert (tmp_path / "tiny" / "dpo-beta0p2" / "adapter" / "complete.json").stat().st_mtime_ns == first
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (second, whole / "dpo")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (tmp_path / "tiny" / "sweeps" / "dpo-beta" / "sweep.html").is_file()
