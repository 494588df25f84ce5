"""The manifest says how a run was made, and never a secret."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit import env, hardware
from toolkit.errors import UserError
from toolkit.files import write_json
from toolkit.recipe.load import load
from toolkit.records.record import plain
from toolkit.records.run_manifest import Manifest
from toolkit.records.run_report import RunReport
from toolkit.redaction import redacted
from toolkit.run import manifest
from toolkit.run.rundir import RunDir

HUB = "hf_" + "abcdefgh" * 4 + "ij"


@pytest.mark.parametrize(
    "command",
    [
        f"run_sft.py --set x={HUB}",
        f"run_sft.py --token {HUB}",
        "token: hunter2hunter2",
        '"api_key": "hunter2hunter2"',
        "https://me:hunter2@hunter2/x@example.org/rows",
        "https://hunter2hunter2@example.org",
        "ghp_" + "abcdefgh" * 4 + "abcd",
        "AKIA" + "HUNTER2" + "ABCDEFGHI",
        "run_export.py --api_key=hunter2hunter2",
        "run_sft.py --password hunter2hunter2",
    ],
)
def test_a_secret_in_the_command_is_blanked(command: str) -> None:
    said = redacted(command)
    assert "***" in said and not [part for part in ("abcdefgh", "hunter2", "HUNTER2") if part in said]


def test_a_secret_of_the_environment_is_blanked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert "0123456789abcdef" not in redacted("run.py --set note=0123456789abcdef")


@pytest.mark.parametrize("name", ["my_api_key", "Db_Password", "github_token"])
def test_a_variable_of_any_case_is_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0123456789abcdef")
    assert redacted("note 0123456789abcdef") == "note ***"


@pytest.mark.parametrize(
    "text",
    ["/data/hf_checkpoints/base", "sk-learn-models", "http://localhost:8080/a@v2", "ghp_short", "<|eot_id|>"],
)
def test_a_path_that_begins_like_a_token_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EOS_TOKEN", "<|eot_id|>")
    assert redacted(text) == text


def test_what_programs_load_is_written_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "<|eot_id|>")
    config = {"eos_token": "<|eot_id|>", "base_model_name_or_path": f"/data/{HUB}"}
    write_json(tmp_path / "tokenizer_config.json", config)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == config


def test_runs_whose_paths_differ_only_in_a_secret_are_two(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    run.start({"path": f"/data/{HUB}/rows"})
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    run.start({"path": f"/data/{HUB}/rows"})
    with pytest.raises(UserError, match="Changed: path"):
        run.start({"path": f"/data/{HUB[:-1]}z/rows"})
    assert HUB not in run.manifest.read_text()


def test_a_variable_of_the_environment_never_changes_which_run_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    run.start({"path": "recipes/tiny"})
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    monkeypatch.setenv("MY_TOKEN", "recipes")
    run.start({"path": "recipes/tiny"})


def test_what_only_sounds_like_a_secret_stays() -> None:
    said = "pad_token '<|eot_id|>' is also an end token: padding is masked; --set template.pad_token=<pad> max_tokens=5"
    assert redacted(said) == said


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as an option, inside an address of the recipe, in the environment, in the text of an exception."""
    secrets = (HUB, "hunter2hunter2", "0123456789abcdef", "sk-ant-0123456789")
    monkeypatch.setenv("WANDB_API_KEY", secrets[2])
    address = f"https://someone:{secrets[1]}@example.org/rows.jsonl"
    words = [f"sft.datasets.0.path={address}", f"model.revision={secrets[0]}", f"description={secrets[2]}"]
    monkeypatch.setattr("sys.argv", ["run_sft.py", *(w for word in words for w in ("--set", word))])
    recipe, run = load("tiny", tuple(words)), RunDir(tmp_path, "tiny", "sft")
    with run.locked():
        run.start(recipe.trajectory("sft"))
        run.record(manifest.describe(recipe, hardware.here(), env.require_prepared()))
        run.record(manifest.begun(run.read_manifest(), 0))
        reason = redacted(f"401 for {address}, Authorization: Bearer {secrets[3]}")
        run.record(manifest.noted(run.read_manifest(), outcome="failed", reason=reason))
        replace(RunReport.unknown(), notes=[address, f"description={secrets[2]}"]).write(run.report)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    for file in files:
        assert not [secret for secret in secrets if secret in file.read_text()], file
    run.start(recipe.trajectory("sft"))  # and it is still the same run


def test_every_attempt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_sft.py", "--recipe", "tiny"])
    recorded = replace(Manifest.unknown(), **manifest.begun(Manifest.unknown(), 0))
    recorded = replace(
        recorded, **manifest.noted(recorded, step=20, seconds=30.0)
    )  # its last checkpoint; then a kill
    recorded = replace(recorded, **manifest.begun(recorded, 20))
    ended = {"outcome": "finished", "ended": manifest.now()}
    recorded = replace(recorded, **manifest.noted(recorded, step=50, seconds=12.5, **ended))
    assert recorded.attempts
    told = [(attempt.from_step, attempt.step, attempt.outcome) for attempt in recorded.attempts]
    assert told == [(0, 20, "killed"), (20, 50, "finished")]
    assert recorded.total_seconds == 42.5
    assert recorded.started == recorded.attempts[0].started


def test_it_names_recipe_packages_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_sft.py", "--recipe", "tiny"])
    made = manifest.describe(load("tiny"), hardware.here(), env.require_prepared())
    assert made["command"] == "run_sft.py --recipe tiny" and made["packages"]["trl"] == "1.15.0"
    assert (
        made["recipe_sha256"]
        != manifest.describe(load("tiny", ("seed=1",)), hardware.here(), env.require_prepared())[
            "recipe_sha256"
        ]
    )
    json.dumps(plain(made))
