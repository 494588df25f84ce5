"""The embedded recipe, whole, by the three scripts: it learns what the README says it learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.conftest import once

pytestmark = pytest.mark.long  # minutes of training, which `make run` shows to a person


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts in an empty folder of a user's own."""
    return once(tmp_path_factory, "user", made) / "runs" / "tiny"


def made(folder: Path) -> Path:
    for name in ("sft", "dpo", "reward", "compare"):
        command = [sys.executable, str(ROOT / f"run_{name}.py"), "--recipe", "tiny"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "\x1b" not in done.stdout
    return folder


def test_sft_teaches_to_answer_and_dpo_to_answer_the_preferred_way(runs: Path) -> None:
    models = json.loads((runs / "compare" / "report.json").read_text())["models"]
    base, sft, dpo = models["base"], models["sft"], models["dpo"]
    assert base["correct_fraction"] <= 0.05 and base["ended_fraction"] <= 0.10
    assert sft["correct_fraction"] >= 0.80 and sft["ended_fraction"] >= 0.95
    assert (
        dpo["correct_fraction"] >= max(0.80, sft["correct_fraction"] - 0.03) and dpo["ended_fraction"] >= 0.95
    )
    assert dpo["preference_accuracy"] >= 0.95
    assert sft["matches"]["courteous"] <= 0.60 and dpo["matches"]["courteous"] >= 0.95
    assert {"correct_fraction", "ended_fraction", "mean_answer_tokens"} <= base.keys()


def test_the_reward_model_tells_held_out_pairs_apart(runs: Path) -> None:
    scores = json.loads((runs / "reward" / "report.json").read_text())["scores"]
    assert scores["accuracy"]["value"] >= 0.95 and scores["accuracy"]["num_rows"] == 96
    assert scores["margin"]["low"] > 1


def test_no_question_is_asked_in_the_rows() -> None:
    folder = ROOT / "recipes" / "tiny"
    asked = [json.loads(line)["messages"][-1]["content"] for line in (folder / "questions.jsonl").open()]
    rows = (folder / "sft.jsonl").read_text() + (folder / "dpo.jsonl").read_text()
    assert len(asked) > 90 and not [
        question for question in asked if json.dumps(question)[1:-1] in rows and "And " not in question
    ]


def test_the_comparison_is_written_for_people_and_programs(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "compare" / "comparison.jsonl").read_text().splitlines()]
    text = (runs / "compare" / "comparison.md").read_text()
    assert rows and all(set(row["answers"]) == {"base", "sft", "dpo"} for row in rows)
    prompts = [row for row in rows if "expected" not in row]
    assert prompts and all(row["prompt"] in text and row["answers"]["dpo"] in text for row in prompts)
    assert f"{len(rows) - len(prompts)} held-out questions" in text
