"""What a job says before it runs."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.run.test_start import finish
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job


def job(run: RunDir, *overrides: str) -> Job:
    recipe = load("tiny", overrides)
    return Job(recipe, plan_stage(recipe, "sft", None, 16), run, Console(quiet=True))


def test_a_finished_run_of_other_values_is_refused_but_a_missing_file_comes_first(tmp_path: Path) -> None:
    run = finish(RunDir(tmp_path, "tiny", "sft"))
    assert job(run).is_finished() and job(run).begins_at_step() is None
    with pytest.raises(
        UserError, match=r"run_sft.py --recipe tiny --name NAME`.*sft.max_rows: None then, 5 now"
    ):
        job(run, "sft.max_rows=5").is_finished()
    with pytest.raises(UserError, match=r"^No file at gone.jsonl \(looked in [^)]*\)[^\n]*$"):
        job(run, "sft.datasets.0.path=gone.jsonl").is_finished()


def test_a_run_that_will_be_shorter_than_its_warm_up(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    assert "at most 6 steps" in (job(run, "sft.max_rows=64").short_for_warmup() or "")
    assert "the run has 4 steps" in (job(run, "sft.max_steps=4").short_for_warmup() or "")
    assert job(run).short_for_warmup() is None
