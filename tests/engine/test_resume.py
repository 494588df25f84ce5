"""Killed, stopped, damaged: the same command again ends with the same weights, bit for bit."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS, Stage, run_stage, tiny
from toolkit.engine import checkpoints, stage
from toolkit.errors import UserError

STEPS = (
    "sft.max_steps=8",
    "dpo.max_steps=6",
    "sft.save_steps=3",
    "dpo.save_steps=2",
    "lora.lora_dropout=0.1",
)


def weights(stage: Stage | Path) -> bytes:
    folder = stage.run.adapter if isinstance(stage, Stage) else stage / "adapter"
    return (folder / "adapter_model.safetensors").read_bytes()


def start(name: str, runs: Path, *overrides: str) -> "subprocess.Popen[str]":
    words = [word for override in (*FEW_ROWS, *overrides) for word in ("--set", override)]
    command = [sys.executable, str(ROOT / f"run_{name}.py"), "--recipe", "tiny", "--runs", str(runs), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, undisturbed."""
    runs = tmp_path_factory.mktemp("whole")
    for name in ("sft", "dpo"):
        run_stage(tiny(*STEPS), name, runs)
    return runs / "tiny"


@pytest.mark.parametrize(("name", "step"), [("sft", 3), ("dpo", 2)])
def test_kill_9_and_again_gives_the_same_weights(name: str, step: int, whole: Path, tmp_path: Path) -> None:
    if name == "dpo":
        shutil.copytree(whole / "sft", tmp_path / "tiny" / "sft")
    run = tmp_path / "tiny" / name
    process = start(name, tmp_path, *STEPS)
    wait_for(process, (run / "checkpoints" / f"checkpoint-{step}").exists)
    process.kill()
    process.wait()
    assert not (run / "adapter").exists()
    again = start(name, tmp_path, *STEPS)
    said = again.communicate()[0]
    assert again.returncode == 0 and "continuing at step" in said, said
    assert weights(run) == weights(whole / name)
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == {"sft": 8, "dpo": 6}[name], "a step is logged twice or not at all"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_whole_checkpoint_first(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start("sft", tmp_path, "sft.max_steps=1000", "sft.max_rows=null")
    metrics = tmp_path / "tiny" / "sft" / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and '"step": 2' in metrics.read_text())
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    [checkpoint] = (tmp_path / "tiny" / "sft" / "checkpoints").iterdir()
    assert checkpoints.damage(checkpoint) is None
    assert "the same command continues from there" in " ".join(said.split()) and "Traceback" not in said


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:

    recipe = tiny(*STEPS)
    done = run_stage(recipe, "sft", tmp_path)
    shutil.rmtree(done.run.adapter)
    folder = done.run.checkpoints
    flipped = bytearray((folder / "checkpoint-6" / "optimizer.pt").read_bytes())
    flipped[1000] ^= 1
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(flipped)
    (folder / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"")
    before = done.console.export_text()
    assert "passed over" not in before
    again = run_stage(recipe, "sft", tmp_path)
    assert (
        "checkpoint of step 8 is passed over: adapter_model.safetensors is not what was written"
        in again.shown
    )
    assert "checkpoint of step 6 is passed over: optimizer.pt is not what was written" in again.shown


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = iter([False, True, False])

    def seal(checkpoint: Path) -> None:
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        sealed(checkpoint)

    sealed = checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", seal)
    done = run_stage(tiny(*STEPS), "sft", tmp_path)
    assert (
        "checkpoint at step 6 not saved (No space left on device); the last good one is of step 3"
        in done.shown
    )
    assert sorted(path.name for path in done.run.checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-8"]
    assert weights(done) == weights(whole / "sft")


def test_what_shapes_the_weights_may_not_change_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        raise Stop

    monkeypatch.setattr(stage.data, "prepare", stop)
    with pytest.raises(Stop):
        run_stage(tiny(), "sft", tmp_path)
    (tmp_path / "tiny" / "sft" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"sft.learning_rate: .* then, 0.5 now"):
        run_stage(tiny("sft.learning_rate=0.5"), "sft", tmp_path)
    with pytest.raises(Stop):
        run_stage(tiny("sft.logging_steps=7"), "sft", tmp_path)
