"""The command as it is called: on this machine, and on one with a GPU that `hardware.here` tells of."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_hardware import CUDA13_BUILD, WITH_GPU, WITHOUT_GPU, with_gpu
from toolkit import hardware
from toolkit.doctor import examine, hub
from toolkit.doctor.check import Check
from toolkit.recipe.load import load

SECRET = "hf_" + "a1B2" * 8
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "run_doctor.py", *words],
        cwd=ROOT,
        env=os.environ | OFFLINE | environment,
        capture_output=True,
        text=True,
    )


def test_tiny_can_run_anywhere() -> None:
    done = doctor("--recipe", "tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tiny can run here\n")
    names = [line[6:].partition("  ")[0] for line in done.stdout.splitlines()[:-1]]
    expected = [
        "python",
        "torch",
        "driver",
        "gpu",
        "bf16",
        "ram",
        "disk of runs",
        "hub",
        "tokens",
        "model",
        "memory",
    ]
    assert [name for name in expected if name not in names] == []


def test_a_recipe_that_cannot_run_is_exit_code_2_and_says_why(tmp_path: Path) -> None:
    done = doctor("--recipe", "llama31_8b", "--json", HF_HOME=str(tmp_path), HF_TOKEN=SECRET)
    assert done.returncode == 2
    found = json.loads(done.stdout)
    failed = {check["name"]: check["fix"] for check in found["checks"] if check["status"] == "fail"}
    assert not found["can_run"]
    assert failed.keys() == {"gpu", "model", "data"}
    assert "--set gpu=null" in failed["gpu"] and "HF_HUB_OFFLINE" in failed["model"]
    assert SECRET not in done.stdout + done.stderr
    assert "HF_TOKEN set" in done.stdout
    assert done.stderr.startswith("error: llama31_8b cannot run here: gpu, model, data")


def test_a_process_that_may_not_have_what_the_libraries_take() -> None:
    command = ["bash", "-c", 'ulimit -v 3000000; exec "$0" run_doctor.py --quiet', sys.executable]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert done.returncode == 2 and "ulimit -v unlimited" in done.stdout, done.stderr


def test_without_a_recipe_the_machine_alone() -> None:
    done = doctor("--quiet")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_it_loads_nothing_heavy() -> None:
    heavy = {"torch", "unsloth", "transformers", "datasets", "trl", "peft"}
    code = (
        "import sys; sys.argv[1:] = ['--recipe', 'tiny', '--quiet']; import run_doctor; run_doctor.main(); "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


class TestOnACard:
    @pytest.fixture(autouse=True)
    def box(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An RTX 4090 with a fitting torch; the Hub has everything."""
        monkeypatch.setattr(hardware, "here", lambda: WITH_GPU)
        monkeypatch.setattr(hardware, "torch_build", lambda: CUDA13_BUILD)
        monkeypatch.setattr(hub, "ask", lambda urls: dict.fromkeys(urls, hub.Answer(None, 0.1)))
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def failed(self, runs: Path, *overrides: str) -> list[Check]:
        found = examine.examine(load("llama31_8b", overrides), runs)
        return [check for check in found if check.status == "fail"]

    def test_the_main_recipe_can_run(self, tmp_path: Path) -> None:
        assert self.failed(tmp_path) == []

    def test_a_card_that_another_process_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "here", lambda: with_gpu(free_gib=9.0))
        (check,) = self.failed(tmp_path)
        assert check.name == "vram" and "predicted to be needed" in str(check.fix)

    def test_rows_that_do_not_fit(self, tmp_path: Path) -> None:
        found = self.failed(tmp_path, "sft.max_length=200000")
        assert {check.name for check in found} >= {"memory"}
        assert "does not fit" in str(found[-1].fix)

    def test_a_set_that_is_not_there(self, tmp_path: Path) -> None:
        (check,) = self.failed(tmp_path, "sft.datasets.0.path=no_such.jsonl")
        assert check.name == "data" and "no_such.jsonl" in str(check.fix)

    def test_a_disk_without_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "disk_free_gib", lambda path: 2.0)
        assert {check.name for check in self.failed(tmp_path)} == {"disk of the Hub", "disk of runs"}

    def test_a_machine_without_the_card(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "here", lambda: replace(WITHOUT_GPU, no_gpu="NVML says: mismatch"))
        (check,) = self.failed(tmp_path)
        assert check.name == "gpu" and "NVML says: mismatch" in str(check.fix)
