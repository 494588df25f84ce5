"""The table of stages: what a row names exists, and what comes before what is worked out from it."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.memory.phases import PHASES
from toolkit.memory.plan import plan_stage
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.stages import STAGES, Stage
from toolkit.report.curves import CHARTS
from toolkit.run.rundir import RunDir
from toolkit.training import trainer_args
from toolkit.training.job import Job


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_what_a_row_names_is_there(stage: Stage) -> None:
    assert set(stage.charts) <= CHARTS.keys()
    assert set(stage.memory_phases) <= PHASES.keys()
    earlier = stages.names()[: stages.names().index(stage.name)]
    assert set(stage.continues) <= set(earlier), "a stage continues one that ran before it"
    assert hasattr(load("tiny"), stage.name) and callable(getattr(trainer_args, stage.name))


def test_a_stage_starts_from_the_first_that_the_recipe_has(monkeypatch: pytest.MonkeyPatch) -> None:
    third = replace(stages.of("dpo"), name="third", continues=("dpo", "sft"))
    monkeypatch.setitem(STAGES, "third", third)
    assert load("tiny").starts_from("third") == "dpo"
    assert load("tiny", ("dpo=null",)).starts_from("third") == "sft"
    assert load("tiny", ("sft=null",)).starts_from("dpo") is None
    assert [stage.name for stage in stages.lineage("third")] == ["sft", "dpo", "third"]
    assert [stage.name for stage in load("tiny").stages()] == ["sft", "dpo", "reward", "kto", "rl"]


def test_a_variant_is_named_after_its_stage() -> None:
    assert [stages.variant("dpo", label) for label in (None, "beta02")] == ["dpo", "dpo-beta02"]
    assert stages.of("dpo-beta02") is stages.of("dpo") and stages.label_of("dpo-beta02") == "beta02"
    assert [stages.title(name) for name in ("base", "sft", "dpo-x-2")] == ["base", "SFT", "DPO x-2"]
    assert stages.in_order(["dpo-a", "sft-b", "dpo", "base", "sft"]) == [
        "base",
        "sft-b",
        "sft",
        "dpo-a",
        "dpo",
    ]
    moved_aside, others = "dpo-x.20260101-120000", ("compare", "dpo-", "dpo-a_b", "dpo-.", "eval.unfinished")
    assert not any(map(stages.is_variant, (moved_aside, *others)))


def test_a_job_knows_its_row() -> None:
    run = RunDir(Path("runs"), "tiny", "dpo")
    job = Job(load("tiny"), plan_stage(load("tiny"), "dpo", None, 16), run, Console(quiet=True))
    assert (job.stage, job.section) == (stages.of("dpo"), job.recipe.dpo)
    assert job.start and job.start.name == "sft"
