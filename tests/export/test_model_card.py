"""The model card shows what was measured of the exported model, with its intervals, and of no other."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.export import model_card
from toolkit.export.artefact import Wanted
from toolkit.recipe.load import load
from toolkit.records.evaluation_report import Evaluation, Measure, ModelMeasures
from toolkit.run.rundir import RunDir


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    run = RunDir(tmp_path, "tiny", "dpo")
    run.start({})
    run.record({"outcome": "finished", "ended": "2026-11-20T21:37:07+00:00"})
    measured = ModelMeasures(
        loss=Measure(1.0, 0.856, 1.14, 64),
        preference_accuracy=Measure(0.979, None, None, 96),  # too few rows to tell an interval
        by_source={},
    )
    models = {"base": ModelMeasures(loss=Measure(5.01, 4.64, 5.36, 64)), "dpo": measured}
    replace(Evaluation.unknown(), models=models).write(run.of("eval").report)
    return Wanted(load("tiny"), run, "adapter", None, tmp_path / "dpo-adapter", True, None)


def test_the_card_shows_the_measures_of_run_eval_with_their_intervals(wanted: Wanted) -> None:
    card = model_card.write(wanted, None, None)
    assert "- dpo, loss: 1.0000 [0.8560, 1.1400]\n" in card
    assert "- dpo, preference_accuracy: 0.9790\n" in card
    assert "5.01" not in card and "Nothing was measured" not in card


def test_measures_of_an_earlier_adapter_are_left_out_and_said(wanted: Wanted) -> None:
    file, notes = wanted.run.of("eval").report, list[str]()
    os.utime(file, (0, 0))
    assert "Nothing was measured" in model_card.write(wanted, None, None, notes=notes)
    assert any("older than the dpo adapter" in note for note in notes)


def test_a_damaged_report_costs_its_measures_alone(wanted: Wanted) -> None:
    notes: list[str] = []
    wanted.run.of("eval").report.write_text('{"models": [')
    assert "Nothing was measured" in model_card.write(wanted, None, None, notes=notes)
    assert len(notes) == 1 and "counts as absent" in notes[0]


def test_a_secret_of_the_recipe_does_not_reach_the_card(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("my_password", "hunter2hunter2")
    words = ("description=made with hunter2hunter2", "compare.prompts=[say hunter2hunter2]")
    card = model_card.write(replace(wanted, recipe=load("tiny", words)), None, None)
    assert "hunter2" not in card and "***" in card


def test_the_licence_of_a_set_stands_beside_it(wanted: Wanted) -> None:
    path = wanted.recipe.section("dpo").datasets[0].path
    assert f"{path} (licence cc-by-4.0)" in model_card.write(
        wanted, None, None, data_licences={path: "cc-by-4.0"}
    )
