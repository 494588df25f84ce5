"""What a real run leaves to be read: answers before and after, report.html, and both when it did not finish."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.engine.conftest import Stage, as_written, run_stage, tiny
from tests.in_browser import look_at
from toolkit.engine.base import model
from toolkit.engine.inference import generate
from toolkit.engine.train import answers, attempt
from toolkit.engine.train import sft as sft_stage
from toolkit.errors import Interrupted, UserError
from toolkit.records.data_report import DataReport
from toolkit.records.marks import AdapterMark
from toolkit.records.run_manifest import Manifest
from toolkit.records.run_report import RunReport
from toolkit.report import run_record
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK

KEYS = RunReport.unknown().__dict__.keys()


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "answers.jsonl").read_text().splitlines()]


def test_dpo_starts_from_the_answers_that_sft_ended_with(sft: Stage, dpo: Stage) -> None:
    prompts = list(sft.recipe.compare.prompts)
    for stage, before in ((sft, "base"), (dpo, "sft")):
        assert [row["prompt"] for row in rows_of(stage.run)] == prompts
        said = stage.report["answers"]
        assert (said["before"], said["after"], said["note"]) == (before, stage.report["stage"], None)
        assert any(row["before"]["text"] != row["after"]["text"] for row in rows_of(stage.run))
    assert [row["before"] for row in rows_of(dpo.run)] == [row["after"] for row in rows_of(sft.run)]


def test_the_files_of_a_run_are_read_by_their_types(sft: Stage, dpo: Stage) -> None:
    for stage in (sft, dpo):
        run = stage.run
        as_written(RunReport, run.report)
        as_written(Manifest, run.manifest)
        as_written(AdapterMark, run.adapter / MARK)
        assert as_written(DataReport, run.data_report).eval is not None
        record = run_record.read(run)
        assert record and record.notes == []


def test_the_pages_of_real_runs_open_without_network_and_show_their_curves(
    sft: Stage, dpo: Stage, browser: Any
) -> None:
    for stage, num_figures, width, scheme in ((sft, 5, 1280, "light"), (dpo, 8, 400, "dark")):
        file = stage.run.page.resolve()
        seen = look_at(browser, file, num_figures, width, scheme)
        assert len(seen.figures) == num_figures
        assert all(figure["drawn"] > 100 for figure in seen.figures)
        assert (seen.requests, seen.complaints, seen.overflow) == ([file.as_uri()], [], 0)
        text = seen.page.inner_text("body")
        assert "Finished" in text
        assert stage.recipe.compare.prompts[0] in text
        assert "No GPU took part" in text
        seen.page.context.close()


def test_a_finished_run_stays_finished_when_the_answers_or_the_page_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory [test]")

    monkeypatch.setattr(generate, "answer", no_memory)
    (tmp_path / "tiny" / "sft" / "report.html").mkdir(parents=True)  # the page cannot take this name
    stage = run_stage(tiny("sft.max_steps=1"), "sft", tmp_path)
    assert stage.run.read_manifest().outcome == "finished"
    assert stage.run.finished_with()
    assert stage.report["answers"]["note"] == "CUDA out of memory [test]"
    assert json.loads(stage.run.report.read_text())["answers"]["note"] == "CUDA out of memory [test]"
    assert "no answers before and after: CUDA out of memory [test]" in stage.shown
    assert "report.html is not written" in stage.shown
    assert not (stage.run.path / "answers.jsonl").exists()


def test_an_interrupted_run_leaves_a_report_of_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pod(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    build = sft_stage.build

    def watched(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Pod())
        return trainer

    monkeypatch.setattr(sft_stage, "build", watched)
    recipe, run = tiny("sft.max_steps=4"), RunDir(tmp_path, "tiny", "sft")
    with pytest.raises(Interrupted):
        run_stage(recipe, "sft", tmp_path)
    report = json.loads(run.report.read_text())
    assert report.keys() == KEYS
    assert (report["outcome"], report["wall_seconds"], report["answers"]) == ("interrupted", None, None)
    assert report["num_steps"] >= 2 and report["loss_first"] and report["planned_items_gib"]
    assert f"continues at step {report['num_steps']} of 4" in run.page.read_text()

    monkeypatch.undo()
    finished = run_stage(recipe, "sft", tmp_path)
    assert finished.report.keys() == KEYS
    assert run.read_manifest().resumed_at_steps == [report["num_steps"]]
    assert "continued 1 time" in run.page.read_text()


def test_a_run_is_nowhere_called_finished_before_its_adapter_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(model, "save_adapter", killed)
    monkeypatch.setattr(attempt, "_write_report", killed)  # a process that is killed writes no more
    with pytest.raises(ZeroDivisionError):
        run_stage(tiny("sft.max_steps=1"), "sft", tmp_path)
    assert not RunDir(tmp_path, "tiny", "sft").report.exists()


@pytest.mark.parametrize("lost", ["manifest.json", "."])
def test_a_run_whose_manifest_or_directory_goes_away_ends_with_one_message_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run, build = RunDir(tmp_path, "tiny", "sft"), sft_stage.build

    class Gone(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                shutil.rmtree(run.path) if lost == "." else run.manifest.unlink()

    def watched(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Gone())
        return trainer

    monkeypatch.setattr(sft_stage, "build", watched)
    recipe = tiny("sft.max_steps=4", "sft.save_steps=1")
    with pytest.raises(UserError, match="was deleted or damaged while the run went on"):
        run_stage(recipe, "sft", tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="made otherwise"):
        run_stage(tiny("sft.max_steps=4", "sft.save_steps=1", "sft.learning_rate=0.5"), "sft", tmp_path)
    assert "continuing at step 2 of 4" in run_stage(recipe, "sft", tmp_path).shown


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    with pytest.raises(UserError):
        run_stage(tiny("sft.max_length=40", "sft.max_dropped_fraction=0"), "sft", tmp_path)
    report = json.loads(run.report.read_text())
    assert report.keys() == KEYS
    assert report["outcome"] == "failed" and "max_dropped_fraction" in report["reason"]
    assert report["num_steps"] == 0 and report["loss_last"] is None
    assert "max_dropped_fraction" in run.page.read_text()


def test_a_signal_while_it_answers_costs_the_answers_and_what_would_come_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(answers, "_both", stopped)
    run = RunDir(tmp_path, "tiny", "sft")
    with pytest.raises(Interrupted, match="the run is finished") as stopped:  # && must not go on
        run_stage(tiny("sft.max_steps=1"), "sft", tmp_path)
    assert stopped.value.signal == signal.SIGTERM
    assert run.read_manifest().outcome == "finished"
    assert json.loads(run.report.read_text())["answers"]["note"] == "a signal asked the run to end"
