"""A stage that only this file knows: a row of the table and a section of the recipe are all it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
from rich.console import Console

from tests.engine.conftest import Stage, tiny
from toolkit.engine.train import sft as sft_stage
from toolkit.engine.train import stage
from toolkit.memory.plan import plan_stage
from toolkit.recipe import stages
from toolkit.recipe.fields import shapes_weights
from toolkit.recipe.schema import Recipe, Sft
from toolkit.records.run_report import RunReport
from toolkit.report.run_page import write
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job


class WithAnother(Recipe):
    """Chats again, from where SFT ended."""

    again: Annotated[Sft | None, shapes_weights("once more", default="there is none")] = None


def test_a_third_stage_trains_on_the_adapter_before_it(
    sft: Stage, runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stages.of("sft")
    again = replace(before, name="again", title="Once more", label="again", continues=("sft",))
    monkeypatch.setitem(stages.STAGES, "again", again)
    recipe = with_another(tiny())
    run = RunDir(runs_with_sft, recipe.name, "again")
    console = Console(record=True, width=200)
    report = train(Job(recipe, plan_stage(recipe, "again", None, 16), run, console))
    assert report.stage == "again" and report.num_steps
    assert report.loss_first and report.loss_first < sft.report["loss_first"], "it goes on where SFT ended"
    assert run.is_finished(recipe.trajectory("again"))
    assert "Once more of tiny" in (write(run) or Path()).read_text()


def train(job: Job) -> RunReport:
    return stage.run(job, sft_stage.build)


def with_another(recipe: Recipe) -> WithAnother:
    values = recipe.model_dump(by_alias=True)
    other = WithAnother.model_validate(values | {"again": values["sft"]})
    other._file = recipe._file
    return other
