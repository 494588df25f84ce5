"""A tracker that cannot be used is said before anything is loaded or made."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.training.trackers import problems


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    [problem] = problems("dpo", ["tensorboard", "wandb"])
    assert "tensorboard and wandb" in problem and "--set dpo.report_to=[]" in problem
    assert (
        "`make optional`" in problem
        and "pip install -c requirements.txt -r requirements-optional.txt" in problem
    )
    assert problems("dpo", []) == []


def test_an_environment_that_wandb_does_not_take_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    code = "from toolkit.training.trackers import problems; print(problems('sft', ['wandb']))"
    monkeypatch.setenv("WANDB_SILENT", "")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "its environment variables are not as it takes them" in done.stdout, done.stderr


def test_wandb_without_a_key_is_refused_before_it_could_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    command = [sys.executable, "run_sft.py", "--recipe", "tiny", "--runs", str(tmp_path / "runs")]
    command += ["--set", "sft.report_to=[wandb]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert "WANDB_MODE=offline" in done.stderr and "Traceback" not in done.stderr
