"""Records on disk: what is written comes back, and a file of another version is read as far as it goes."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.records.comparison_report import AnswerMeasures, Comparison
from toolkit.records.data_report import DataReport, HeldOut, SelectionStep
from toolkit.records.evaluation_report import Evaluation, HeldOutMeasures, Measure, ModelMeasures, TaskMeasure
from toolkit.records.marks import AdapterMark, ExportMark, Seal
from toolkit.records.parity import Parity, Quantisation, Tolerance
from toolkit.records.record import Record, plain
from toolkit.records.run_manifest import Attempt, Base, Gpu, Manifest, PlanMade
from toolkit.records.run_report import Answers, Probe, RunReport

LOSS = Measure(0.5, 0.25, 0.75, 64)
TOLERANCE = Tolerance(0.75, 0.06, 0.95, "measured")
ATTEMPT = replace(Attempt.unknown(), from_step=0, step=5, outcome="killed")
ROWS: dict[str, Any] = {
    "read": 3,
    "used": 2,
    "dropped": {"empty_reply": 1},
    "first_rows": {"empty_reply": [2, "other.jsonl:7"]},
    "cut": 0,
    "cut_fraction": 0.0,
    "tokens_per_epoch": 30,
    "trained_tokens_per_epoch": 10,
    "prompt_tokens_per_epoch": 20,
    "lengths": {"total": {"p50": 12, "max": 18}},
    "selection": [SelectionStep("deduplicate", 4, 3)],
}
RECORDS = (
    replace(
        RunReport.unknown(),
        stage="dpo",
        loss_last=1,
        eval={"loss": None},
        probe=Probe.unknown(),
        oom_events=[{"step": 3}],
        answers=replace(Answers.unknown(), before="sft"),
    ),
    DataReport(**ROWS, max_length=64, suggestion=None),
    DataReport(**ROWS, max_length=64, suggestion="shorter", eval=HeldOut(**ROWS, leaks=2)),
    replace(
        Manifest.unknown(),
        trajectory={"sft.datasets": [{"path": "rows.jsonl"}]},
        base_model=Base("tiny/base", None, {"model.safetensors": "00"}),
        gpu=Gpu("NVIDIA GeForce RTX 4090", 23.99, "580.65"),
        attempts=[ATTEMPT, ATTEMPT],
        plan=replace(PlanMade.unknown(), peak_gib=20.5, settings={"recompute_layers": 4}),
        wandb_run="3a",
    ),
    replace(
        Evaluation.unknown(),
        models={
            "base": ModelMeasures(),
            "sft": ModelMeasures(
                loss=LOSS,
                by_source={"fables": HeldOutMeasures(loss=LOSS)},
                tasks={"arc_easy": {"acc": TaskMeasure(0.5, None, 3)}},
                chat_template=False,
            ),
        },
    ),
    replace(Comparison.unknown(), models={"base": AnswerMeasures.unknown()}),
    Parity(
        *(0.1, 0.01, 1.0, 1.0),
        *("the model", TOLERANCE, "bfloat16", 0.2, 2, 24, [], True),
        quantisation=Quantisation(0.5, 0.1, 0.9, 0.9, TOLERANCE),
    ),
    Seal(files={"adapter_model.safetensors": "00"}),
    AdapterMark(
        trajectory={"seed": 1}, conditions={"rows.train": "00"}, num_steps=4, files={"tokenizer.json": "00"}
    ),
    replace(ExportMark.unknown(), format="adapter", verified=True),
)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_written_is_read_again(tmp_path: Path, record: Record) -> None:
    notes: list[str] = []
    record.write(tmp_path / "record.json")
    assert type(record).load(tmp_path / "record.json", notes) == record
    assert notes == []


def test_a_key_without_a_value_is_null_and_one_that_comes_later_is_absent() -> None:
    assert plain(RunReport.unknown()) == dict.fromkeys(field.name for field in fields(RunReport))
    assert plain(ModelMeasures(loss=LOSS)) == {
        "loss": {"value": 0.5, "low": 0.25, "high": 0.75, "num_rows": 64}
    }
    assert "eval" not in plain(DataReport(**ROWS, max_length=64, suggestion=None))


def test_nan_is_null_and_secrets_are_blanked(tmp_path: Path) -> None:
    report = replace(RunReport.unknown(), loss_last=math.nan, notes=["hf_" + "a" * 34])
    report.write(tmp_path / "report.json")
    read = RunReport.load(tmp_path / "report.json")
    assert read and (read.loss_last, read.notes) == (None, ["***"])


def test_an_older_file_says_in_one_line_what_is_unknown_and_missing(tmp_path: Path) -> None:
    stored = plain(replace(RunReport.unknown(), num_steps=7, probe=Probe.unknown()))
    del stored["answers"], stored["probe"]["seconds"]
    stored |= {"perplexity": 3.5}
    notes: list[str] = []
    read = RunReport.load(write(tmp_path / "report.json", stored), notes)
    assert read == replace(RunReport.unknown(), num_steps=7, probe=Probe.unknown())
    assert notes == [
        f"{tmp_path / 'report.json'} is of another version of the toolkit: unknown keys: perplexity; "
        "missing: probe.seconds, answers"
    ]


def test_many_differences_stay_one_short_line(tmp_path: Path) -> None:
    notes: list[str] = []
    assert RunReport.load(write(tmp_path / "report.json", {}), notes) == RunReport.unknown()
    assert len(notes) == 1 and "\n" not in notes[0] and f"and {len(fields(RunReport)) - 8} more" in notes[0]


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"models": ["base"]}, "of another kind: models"),
        ({"models": {"sft": 3}}, "of another kind: models.sft"),
        ({"models": {"sft": {"loss": {"value": "low"}}}}, "of another kind: models.sft.loss.value"),
        ({"models": {"sft": {"loss": {"value": True}}}}, "of another kind: models.sft.loss.value"),
        ({"models": {"sft": {"reliability": [3]}}}, "of another kind: models.sft.reliability"),
    ],
)
def test_a_value_of_another_kind_counts_as_unknown_and_leaves_the_others(
    tmp_path: Path, stored: dict[str, Any], said: str
) -> None:
    notes: list[str] = []
    if isinstance(stored["models"], dict):
        stored["models"]["base"] = {"loss": plain(LOSS)}
    read = Evaluation.load(write(tmp_path / "report.json", stored), notes)
    assert read and len(notes) == 1 and notes[0].endswith(said)
    assert not isinstance(stored["models"], dict) or (read.models or {})["base"].loss == LOSS


def test_what_cannot_do_without_a_value_is_absent_as_a_whole(tmp_path: Path) -> None:
    notes: list[str] = []
    assert Parity.load(write(tmp_path / "parity.json", {"passed": True}), notes) is None
    assert len(notes) == 1


@pytest.mark.parametrize("stored", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_absent_and_said(tmp_path: Path, stored: bytes) -> None:
    notes: list[str] = []
    (tmp_path / "report.json").write_bytes(stored)
    assert RunReport.load(tmp_path / "report.json", notes) is None
    assert notes == [f"{tmp_path / 'report.json'} holds no JSON object and counts as absent"]


def test_no_file_is_nothing_to_speak_of(tmp_path: Path) -> None:
    notes: list[str] = []
    assert RunReport.load(tmp_path / "report.json", notes) is None and notes == []
