"""The manifest says how a run was made, and never a secret."""

import json

import pytest

from toolkit import env, hardware, manifest
from toolkit.recipe import load


@pytest.mark.parametrize(
    "command",
    [
        "run_sft.py --set x=hf_abcdefghijklmnop",
        "run_sft.py --token hf_abcdefghijklmnop",
        "run_export.py --api_key=hunter2hunter2",
        "run_sft.py --password hunter2hunter2",
    ],
)
def test_a_secret_in_the_command_is_blanked(command: str) -> None:
    said = manifest.redacted(command)
    assert "***" in said and "abcdefgh" not in said and "hunter2" not in said


def test_a_secret_of_the_environment_is_blanked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert "0123456789abcdef" not in manifest.redacted("run.py --set note=0123456789abcdef")


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
    json.dumps(made)
