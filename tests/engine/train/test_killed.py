"""Killed at named moments and at a random one, the same command again ends with the same weights, bit for bit.

A process that the kernel kills for want of memory gets the same SIGKILL. benchmarks/faults.py does it at any moment.
"""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.engine.conftest import FEW_ROWS, STEPS, run_stage, tiny, weights
from tests.engine.scripts import Script
from toolkit.engine.train import checkpoints

# So many forward passes are over at the latest before the second checkpoint: probe, reference, proof, steps.
FORWARDS = {"sft": 5, "dpo": 8}
LAYER = "bitsandbytes.nn:Linear4bit.forward", 28  # its calls in one forward pass
BACKWARD = "accelerate:Accelerator.backward"


@pytest.fixture(params=["sft", "dpo"])
def name(request: pytest.FixtureRequest, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stage that can run in `tmp_path`, with a cache of its own: preparing and the reference pass are killed too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "dpo":
        shutil.copytree(whole / "sft", tmp_path / "tiny" / "sft")
    return str(request.param)


def killed(place: str, calls: int, signals: str, name: str, runs: Path) -> tuple[int, str]:
    """(exit code, what was said) of the run that sends itself signals at that call of a function."""
    words = [word for override in (*FEW_ROWS, *STEPS) for word in ("--set", override)]
    driver = ["tests.engine.killed", place, str(calls), signals, name]
    script = Script([*driver, "--recipe", "tiny", "--runs", str(runs), *words], runs / "said")
    return script.wait(), script.said()


@pytest.mark.long
def test_killed_while_it_saves_a_checkpoint_it_ends_with_the_same_weights(
    name: str, whole: Path, tmp_path: Path
) -> None:
    run, first = tmp_path / "tiny" / name, {"sft": 3, "dpo": 2}[name]
    assert killed("toolkit.run.sealing:seal", 2, "SIGKILL", name, tmp_path)[0] == -signal.SIGKILL
    assert list((run / "checkpoints" / ".staging").glob("checkpoint-*/optimizer.pt"))
    again = run_stage(tiny(*STEPS), name, tmp_path)
    assert f"continuing at step {first} of" in again.shown
    assert weights(run) == weights(whole / name)


@pytest.mark.long
def test_killed_again_and_again_it_ends_with_the_same_weights(name: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny" / name
    call = random.randint(1, FORWARDS[name] * LAYER[1])
    code, said = killed(LAYER[0], call, "SIGKILL", name, tmp_path)
    assert code == -signal.SIGKILL, (call, said)

    gentle = name == "sft"
    code, said = killed(BACKWARD, 3, "SIGTERM" if gentle else "SIGINT,SIGINT", name, tmp_path)
    assert code == (143 if gentle else 130) and "Traceback" not in said, said
    if gentle:  # the step in flight ended
        said = " ".join(said.split())
        found = re.search(r"stopped at step (\d), \d+\.\d s after SIGTERM; the same command continues", said)
        assert found and checkpoints.damage(run / "checkpoints" / f"checkpoint-{found[1]}") is None, said

    assert killed("toolkit.run.sealing:seal", 1, "SIGKILL", name, tmp_path)[0] == -signal.SIGKILL
    assert list((run / "checkpoints" / ".staging").glob("checkpoint-*/optimizer.pt")), (
        "none was being written"
    )
    saving = "transformers:GenerationConfig.save_pretrained"
    assert killed(saving, 1, "SIGKILL", name, tmp_path)[0] == -signal.SIGKILL
    assert (run / ".adapter.tmp" / "adapter_model.safetensors").exists() and not (run / "adapter").exists()

    again, last = run_stage(tiny(*STEPS), name, tmp_path), {"sft": 7, "dpo": 5}[name]
    assert weights(run) == weights(whole / name)
    assert f"continuing at step {last} of {last}" in again.shown
    assert f"ended without a word after its checkpoint of step {last}" in again.shown
    assert (
        again.report["train_tokens"] == json.loads((whole / name / "report.json").read_text())["train_tokens"]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, last + 1)), (
        "twice or not at all"
    )
    recorded = again.run.read_manifest()
    story = [attempt.outcome for attempt in recorded.attempts]
    assert story == ["killed", "interrupted", "killed", "killed", "finished"]
    assert recorded.total_seconds == sum(attempt.seconds for attempt in recorded.attempts)
    assert not list(run.glob(".*")) and not (run / "checkpoints" / ".staging").exists(), "something was left"
