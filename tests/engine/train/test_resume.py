"""Stopped, damaged, out of room: the same command again ends with the same weights. Kills are in test_killed.py."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tests.conftest import ROOT
from tests.engine.conftest import STEPS, run_stage, tiny, weights
from toolkit.engine.base import model, tokens
from toolkit.engine.data import preparation
from toolkit.engine.reference import proof
from toolkit.engine.train import checkpoints
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.errors import Interrupted, UserError
from toolkit.run import manifest


class Stop(Exception):
    pass


def stop(*args: object, **kwargs: object) -> None:
    raise Stop


def signalled(number: int, act: Any) -> Any:
    """The same function, after a signal to this process."""

    def send(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return act(*args, **kwargs)

    return send


@pytest.mark.long
def test_looking_at_held_out_rows_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """With dropout, which draws from the same dice; `whole` looks at them at its end."""
    looked = run_stage(tiny(*STEPS, "sft.eval_steps=2"), "sft", tmp_path)
    assert weights(looked) == weights(whole / "sft")


@pytest.mark.long
@pytest.mark.parametrize("name", ["sft", pytest.param("dpo", marks=pytest.mark.campaign)])
def test_what_a_signal_drops_is_done_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bit, in the middle of a step, in the first step of an epoch, and in an evaluation."""
    recipe = tiny(
        *STEPS,
        *(["sft=null"] if name == "dpo" else ["sft.max_rows=40"]),
        "model.load_in_4bit=false",
        "memory.per_device_train_batch_size=2",
        f"{name}.effective_batch_size=8",  # 32 rows: 4 steps an epoch
        "dpo.max_rows=40",
        f"{name}.max_steps=7",
        f"{name}.eval_steps=2",
        f"{name}.save_steps=100",
    )
    undisturbed = run_stage(recipe, name, tmp_path / "whole")
    left = 0

    def counted(step: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        return count

    saved = []
    for method, calls in (  # one call of a training step is the probe's
        ("training_step", 1 + 2 * 4 + 2),
        ("training_step", 1 + 2 * 4 + 1),
        ("prediction_step", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(OutOfMemoryRecovery, method, counted(getattr(OutOfMemoryRecovery, method)))
            left = calls
            with pytest.raises(Interrupted) as stopped:
                run_stage(recipe, name, tmp_path)
        assert stopped.value.signal == signal.SIGTERM
        folder = tmp_path / "tiny" / name / "checkpoints"
        saved.append(sorted(path.name for path in folder.iterdir())[-1])
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    again = run_stage(recipe, name, tmp_path)
    assert weights(again) == weights(undisturbed)
    assert again.report["train_tokens"] == undisturbed.report["train_tokens"]


@pytest.mark.long
def test_a_signal_outside_training_leaves_nothing_half_made(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "sft", tmp_path / "tiny" / "sft")
    for owner, name, number in (
        (tokens, "set_tokens", signal.SIGINT),
        (proof, "log_probs_of", signal.SIGTERM),
        (GenerationConfig, "save_pretrained", signal.SIGTERM),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, signalled(number, getattr(owner, name)))
            with pytest.raises(Interrupted) as stopped:
                run_stage(tiny(*STEPS), "dpo", tmp_path)
        assert stopped.value.signal == number
        run = tmp_path / "tiny" / "dpo"
        assert not (run / "adapter").exists() and not (run / ".adapter.tmp").exists()
    monkeypatch.setattr(preparation, "prepare", signalled(signal.SIGHUP, preparation.prepare))
    assert weights(run_stage(tiny(*STEPS), "dpo", tmp_path)) == weights(whole / "dpo")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "sft" / "adapter")
    folder = tmp_path / "tiny" / "sft" / "checkpoints"
    flipped = bytearray((folder / "checkpoint-6" / "optimizer.pt").read_bytes())
    flipped[1000] ^= 1
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(flipped)
    (folder / "checkpoint-7" / "adapter_model.safetensors").write_bytes(b"")
    again = run_stage(tiny(*STEPS), "sft", tmp_path)
    assert (
        "checkpoint of step 7 is passed over: adapter_model.safetensors is not what was written"
        in again.shown
    )
    assert "checkpoint of step 6 is passed over: optimizer.pt is not what was written" in again.shown
    assert all(checkpoints.damage(folder / f"checkpoint-{step}") is None for step in (6, 7))
    assert weights(again) == weights(whole / "sft")


# Checkpoints: when, how long, which stay -----------------------------------------------------------------------


def test_the_last_two_and_the_best_by_evaluation_stay(tmp_path: Path) -> None:
    spoiling = (
        "sft.learning_rate=0.5",
        "sft.warmup_steps=2",
    )  # the first step has none, the second spoils it
    done = run_stage(
        tiny(*STEPS, *spoiling, "sft.save_steps=1", "sft.eval_steps=1", "sft.max_steps=4"), "sft", tmp_path
    )
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in map(json.loads, done.run.metrics.read_text().splitlines())
        if "eval_loss" in entry
    }
    best = min(losses, key=losses.__getitem__)
    assert best == 1, losses
    kept = sorted(path.name for path in done.run.checkpoints.iterdir())
    assert kept == [f"checkpoint-{step}" for step in (1, 3, 4)]
    state = json.loads((done.run.checkpoints / "checkpoint-4" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == done.run.checkpoints / "checkpoint-1"


@pytest.mark.long
def test_by_minutes_too_and_a_slow_one_is_warned_of_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the wall clock goes back an hour at every look: nothing depends on it."""
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", earlier)
    rare = ("sft.save_steps=1000", "sft.save_minutes=1e-9", "sft.save_within_seconds=1e-9")
    done = run_stage(tiny(*STEPS, *rare), "sft", tmp_path)
    assert sorted(path.name for path in done.run.checkpoints.iterdir()) == ["checkpoint-6", "checkpoint-7"]
    assert done.shown.count("more than save_within_seconds 1e-09") == 1
    lines = [json.loads(line) for line in done.run.metrics.read_text().splitlines()]
    seconds = [line["checkpoint_seconds"] for line in lines if "checkpoint_seconds" in line]
    assert len(seconds) == 7 and done.report["checkpoint_seconds"] == max(seconds) > 0
    assert weights(done) == weights(whole / "sft"), "a checkpoint changes nothing"


# A disk that refuses -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with as much room as a plan asks for, and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=330m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Writes until nothing goes in any more."""
    with (folder / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(2**20))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_full_disk_costs_checkpoints_and_ends_in_one_message(
    whole: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.CheckpointClock.on_save

    def fill_after_the_first(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if not (small_disk / "ballast").exists():
            fill(small_disk)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointClock, "on_save", fill_after_the_first)
        with pytest.raises(UserError, match=r"cannot write to .* No space left on device\. Make room there"):
            run_stage(tiny(*STEPS), "sft", small_disk)
    run = small_disk / "tiny" / "sft"
    [good] = (run / "checkpoints").iterdir()
    assert good.name == "checkpoint-3" and checkpoints.damage(good) is None
    with pytest.raises(UserError, match="No space left on device"):  # not even the manifest can be written
        run_stage(tiny(*STEPS), "sft", small_disk)
    (small_disk / "ballast").unlink()
    again = run_stage(tiny(*STEPS), "sft", small_disk)
    assert "continuing at step 3 of 7" in again.shown and weights(again) == weights(whole / "sft")


def test_with_room_again_the_next_checkpoint_is_saved(
    whole: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_end = checkpoints.CheckpointClock.on_step_end

    def full_around_step_6(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            fill(small_disk)
        if state.global_step == 7:
            (small_disk / "ballast").unlink()
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(checkpoints.CheckpointClock, "on_step_end", full_around_step_6)
    done = run_stage(tiny(*STEPS), "sft", small_disk)
    assert re.search(r"checkpoint at step 6 not saved \(.*\); the last good one is of step 3", done.shown)
    assert sorted(path.name for path in done.run.checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-7"]
    lines = [json.loads(line) for line in done.run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert weights(done) == weights(whole / "sft")


# What may not change on the way --------------------------------------------------------------------------------


def test_what_shapes_the_weights_may_not_change_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    text = (ROOT / "recipes" / "tiny" / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows.write_text("\n".join(text), encoding="utf-8")
    mine = (f"sft.datasets.0.path={rows}", "sft.max_rows=null", "sft.save_steps=1")
    monkeypatch.setattr(model, "save_adapter", stop)
    with pytest.raises(Stop):
        run_stage(tiny(*mine, "sft.max_steps=2"), "sft", tmp_path)

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError, match="an unfinished sft run that was made otherwise") as error:
            run_stage(tiny(*mine, "sft.max_steps=2", *overrides), "sft", tmp_path)
        return str(error.value)

    assert "sft.learning_rate: 0.002 then, 0.5 now" in refused("sft.learning_rate=0.5")
    assert "memory.per_device_train_batch_size: 16 then, 8 now" in refused(
        "memory.per_device_train_batch_size=8"
    )
    now = manifest.packages()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "packages", lambda: now | {"torch": "9.9"})
        said = refused()
    assert f"packages.torch: '{now['torch']}' then, '9.9' now" in said and "packages.trl" not in said
    rows.write_text("\n".join([*text[1:], text[0]]), encoding="utf-8")
    assert "rows.train: " in refused()
    rows.write_text("\n".join(text), encoding="utf-8")
    with pytest.raises(Stop):  # what only watches may change
        run_stage(
            tiny(*mine, "sft.max_steps=2", "sft.logging_steps=7", "sft.save_minutes=1"), "sft", tmp_path
        )


@pytest.mark.parametrize("eval_steps", ["null", "2"])
def test_the_last_evaluation_is_made_and_written_once_wherever_the_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_steps: str
) -> None:
    recipe = tiny(*STEPS, "sft.max_steps=2", f"sft.eval_steps={eval_steps}")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_adapter", stop)
        with pytest.raises(Stop):
            run_stage(recipe, "sft", tmp_path)
    done = run_stage(recipe, "sft", tmp_path)
    lines = [json.loads(line) for line in done.run.metrics.read_text().splitlines()]
    assert sum("eval_loss" in line for line in lines) == 1
    assert sum("train_runtime" in line for line in lines) == 1
    assert done.report["eval"]["loss"] == next(line["eval_loss"] for line in lines if "eval_loss" in line)
