"""Runs of a sweep share one loaded model, and come out as if each had been alone."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.engine.conftest import FEW_ROWS, run_stage, tiny, weights
from tests.engine.conftest import STEPS as UNDISTURBED
from tests.engine.scripts import Script
from toolkit.engine.base import model
from toolkit.engine.reference import precompute
from toolkit.engine.train import sweep
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.errors import Interrupted
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

STEPS = ("dpo.max_steps=3", "dpo.beta=0.3")


def job(runs: Path, name: str, *overrides: str) -> Job:
    recipe = tiny(*STEPS, *overrides)
    return Job(recipe, plan_stage(recipe, "dpo", None, 16), RunDir(runs, "tiny", name), Console(quiet=True))


@pytest.mark.long
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


def losses(run: RunDir) -> list[float]:
    entries = map(json.loads, run.metrics.read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.long
def test_what_the_commands_of_a_sweep_trained_the_sweep_finds_finished(
    runs_with_sft: Path, tmp_path: Path
) -> None:
    words = ["--recipe", "tiny", "--runs", str(runs_with_sft)]
    words += [word for override in (*FEW_ROWS, "dpo.max_steps=2") for word in ("--set", override)]
    sweep_words = ["run_sweep.py", *words, "--stage", "dpo", "--vary", "dpo.beta=0.05,0.2"]
    printed = Script([*sweep_words, "--commands"], tmp_path / "printed")
    assert printed.wait() == 0
    for line in printed.said().splitlines():
        alone = Script(shlex.split(line)[1:], tmp_path / "alone")
        assert alone.wait() == 0, alone.said()
    together = Script(sweep_words, tmp_path / "together")
    assert together.wait() == 0, together.said()
    assert together.said().count("is finished") == 2 and "swept 2 runs" in together.said()
    swept = json.loads((runs_with_sft / "tiny/sweeps/dpo-beta/sweep.json").read_text())
    assert swept["points"] == {"dpo-beta0p05": {"dpo.beta": 0.05}, "dpo-beta0p2": {"dpo.beta": 0.2}}


@pytest.mark.campaign
def test_a_run_that_fails_ends_no_other_and_a_stopped_sweep_ends_as_an_undisturbed_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "sft", tmp_path / "tiny" / "sft")
    jobs = []
    for name, override in (("bad", "learning_rate=1e30"), ("other", "beta=0.2"), ("same", "beta=0.1")):
        recipe = tiny(*UNDISTURBED, f"dpo.{override}")
        run = RunDir(tmp_path, "tiny", f"dpo-{name}")
        jobs.append(Job(recipe, plan_stage(recipe, "dpo", None, 16), run, Console(quiet=True)))
    save = DurableCheckpoints._save_checkpoint

    def save_and_stop(trainer: Any, *args: Any, **kwargs: Any) -> None:
        save(trainer, *args, **kwargs)
        if "dpo-same" in trainer.args.output_dir and trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DurableCheckpoints, "_save_checkpoint", save_and_stop)
    told: list[list[str]] = []
    with pytest.raises(Interrupted):
        sweep.run(jobs, Console(quiet=True), lambda failed: told.append([*failed]))
    assert told == [["dpo-bad"]] * 3, "after each of them"
    bad, other, same = jobs
    assert bad.run.finished_with() is None and other.is_finished() and same.begins_at_step() == 3
    assert sweep.run([same], Console(quiet=True), lambda failed: None) == {}
    assert weights(same.run.path) == weights(whole / "dpo")
