"""Two processes train what one does: the same rows in each step, the same weights; and they end together."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.engine import ranks
from tests.engine.conftest import FEW_ROWS, STEPS, Stage, float32, once, run_stage, tiny, wait_for, weights
from tests.engine.train.test_rl import FEW as FEW_RL
from tests.engine.train.test_rl import beside_sft
from toolkit.engine.train.across_ranks import AcrossRanks, OwnRows, merge
from toolkit.run.rundir import RunDir

EVALUATED = "sft.eval_steps=2"
# Weights in float32, relative to their size. Adam and clipping hide a factor in the gradients: the log shows it.
NEAR = 1e-3


def apart(one: Path, other: Path) -> float:
    """How far weights are from others, relative to their size."""
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    differences = torch.cat([(left[name] - right[name]).flatten() for name in left])
    return float(differences.norm() / torch.cat([value.flatten() for value in right.values()]).norm())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Dealt(AcrossRanks):
    """Its way to deal rows, without a trainer."""

    def __init__(self, rank: int, size: int, lengths: list[int]):
        self.processes = type("Processes", (), {"rank": rank, "size": size})()
        self.__dict__["_lengths"] = lengths


@given(
    lengths=st.lists(st.integers(1, 4096), min_size=1, max_size=70),
    size=st.integers(2, 5),
    each=st.integers(1, 4),
)
def test_every_row_of_a_step_is_dealt_once(lengths: list[int], size: int, each: int) -> None:
    order, rows_per_step = list(range(len(lengths)))[::-1], size * each
    samplers = [OwnRows(order, rows_per_step, Dealt(rank, size, lengths)._deal) for rank in range(size)]
    dealt = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == list(map(len, dealt))
    for step in range(len(order) // rows_per_step):
        own = [rows[step * each : (step + 1) * each] for rows in dealt]
        assert sorted(itertools.chain(*own)) == sorted(
            order[step * rows_per_step : (step + 1) * rows_per_step]
        )
        tokens = [sum(lengths[row] for row in rows) for rows in own]
        assert max(tokens) - min(tokens) <= max(lengths)
    if rest := len(order) % rows_per_step:
        own = [rows[len(order) // rows_per_step * each :] for rows in dealt]
        assert all(own), "a process without a row would take one step fewer"
        assert {row for rows in own for row in rows} == set(order[-rest:])


def test_what_is_logged_is_that_of_all() -> None:
    of_two = [
        {"accuracy": [0.5, 1.0], "num_tokens": [10.0], "completions/min_length": [3.0], "only_here": [2.0]},
        {"accuracy": [0.0], "num_tokens": [5.0], "completions/min_length": [1.0]},
    ]
    found = {
        "accuracy": [0.5, 1.0, 0.0],
        "num_tokens": [15.0],
        "completions/min_length": [1.0],
        "only_here": [2.0],
    }
    assert merge(of_two, same_batches=True) == found
    assert merge(of_two, same_batches=False) == found | {"completions/min_length": [3.0, 1.0]}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT by one process, in float32."""

    def train(runs: Path) -> Path:
        with float32():
            return run_stage(tiny(), "sft", runs).run.path

    return once(tmp_path_factory, "one-process", train)


def as_one(run: Path, other: Path) -> None:
    """Two runs trained the same."""
    assert apart(run, other) < NEAR
    for here, there in zip(lines(run), lines(other), strict=True):
        assert here["step"] == there["step"] and here.get("num_tokens") == there.get("num_tokens")
        for name in here.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate", "mean_token_accuracy"}:
            assert here[name] == pytest.approx(there[name], rel=2e-3), (name, here["step"])


def test_two_processes_train_what_one_does(one: Path, tmp_path: Path) -> None:
    scripts = ranks.start("sft", tmp_path, in_all=["float32"])
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    run = tmp_path / "tiny" / "sft"
    as_one(run, one)
    assert json.loads((run / "manifest.json").read_text())["conditions"]["processes"] == 2
    assert scripts[1].said() == "", "the first process speaks"


@pytest.mark.long
def test_one_of_them_without_a_row_in_a_step(tmp_path: Path) -> None:
    """The last step of an epoch has one row; tokens are counted by Unsloth, as on a GPU."""
    few = ("sft.max_rows=17", "sft.num_train_epochs=2")
    with float32():
        alone = run_stage(tiny(*few), "sft", tmp_path / "one")
    scripts = ranks.start("sft", tmp_path, *few, in_all=["float32", "gpu_batches"])
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    as_one(tmp_path / "tiny" / "sft", alone.run.path)


@pytest.mark.long
def test_two_processes_train_dpo_as_one_does(sft: Stage, tmp_path: Path) -> None:
    """The reference is computed once, half by each, and proved by both. The held-out pairs make one batch of one."""
    few = ("dpo.learning_rate=5e-3", "dpo.per_device_eval_batch_size=96")
    with float32():
        alone = run_stage(tiny(*few), "dpo", beside_sft(sft, tmp_path / "one"))
    scripts = ranks.start("dpo", beside_sft(sft, tmp_path), *few, in_all=["float32"])
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    run = tmp_path / "tiny" / "dpo"
    as_one(run, alone.run.path)
    assert "12 train pairs" in scripts[0].said()
    assert "the reference is the policy" in (run / "log.rank1.txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps of SFT with dropout by two processes."""

    def train(runs: Path) -> Path:
        scripts = ranks.start("sft", runs, *STEPS, EVALUATED)
        assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
        return runs / "tiny" / "sft"

    return once(tmp_path_factory, "two-processes", train)


@pytest.mark.long
def test_a_signal_to_one_stops_both_after_the_same_step(undisturbed: Path, tmp_path: Path) -> None:
    scripts, run = ranks.start("sft", tmp_path, *STEPS, EVALUATED), tmp_path / "tiny" / "sft"
    wait_for(scripts[0], lambda: " 3/7 " in scripts[0].said())
    scripts[1].terminate()
    assert ranks.end(scripts) == [143, 143]
    assert ranks.said(scripts).count("the same command continues from there") == 1
    step = int(saved(run)[-1].removeprefix("checkpoint-"))
    assert {path.name for path in (run / "checkpoints" / f"checkpoint-{step}").glob("rng*")} == {
        "rng_state.pth",
        "rng_state_1.pth",
    }
    again = ranks.start("sft", tmp_path, *STEPS, EVALUATED)
    assert ranks.end(again) == [0, 0], ranks.said(again)
    assert f"continuing at step {step}" in again[0].said()
    assert weights(run) == weights(undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.campaign), 1])
def test_a_killed_process_ends_the_other_and_the_same_command_continues(
    who: int, undisturbed: Path, tmp_path: Path
) -> None:
    scripts = ranks.start("sft", tmp_path, *STEPS, EVALUATED)
    wait_for(scripts[0], lambda: " 4/7 " in scripts[0].said())
    scripts[who].kill()
    assert scripts[1 - who].wait(30) == 2, ranks.said(scripts)
    assert ranks.said(scripts).count("the same command continues from the last checkpoint") == 1
    assert "Traceback" not in ranks.said(scripts)
    again = ranks.start("sft", tmp_path, *STEPS, EVALUATED)
    assert ranks.end(again) == [0, 0], ranks.said(again)
    assert weights(tmp_path / "tiny" / "sft") == weights(undisturbed)


@pytest.mark.long
def test_one_process_short_of_memory_waits_for_nobody(one: Path, tmp_path: Path) -> None:
    scripts = ranks.start("sft", tmp_path, in_all=["float32"], in_last=["scarce:3"])
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    run = tmp_path / "tiny" / "sft"
    as_one(run, one)
    told = json.loads((run / "report.json").read_text())["oom_events"]
    assert {event["rank"] for event in told} == {1}
    assert [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()] == told


@pytest.mark.long
def test_another_number_of_processes_asks_for_reshard(undisturbed: Path, tmp_path: Path) -> None:
    """From two processes to one, in the middle of a run."""
    run = tmp_path / "tiny" / "sft"
    shutil.copytree(undisturbed, run)
    for gone in ("adapter", "checkpoints/checkpoint-7"):
        shutil.rmtree(run / gone)
    words = [word for override in (*FEW_ROWS, *STEPS, EVALUATED) for word in ("--set", override)]
    words = [str(ROOT / "run_sft.py"), "--recipe", "tiny", "--runs", str(tmp_path), *words]
    refused = ranks.Script(words, tmp_path / "refused")
    assert refused.wait() == 2
    assert "processes: 2 then, 1 now" in " ".join(refused.said().split()) and "--reshard" in refused.said()
    resharded = ranks.Script([*words, "--reshard"], tmp_path / "resharded")
    assert resharded.wait() == 0, resharded.said()
    assert "continuing at step 6" in resharded.said()
    stopped = [line["loss"] for line in lines(run) if "loss" in line]
    whole = [line["loss"] for line in lines(undisturbed) if "loss" in line]
    assert stopped == pytest.approx(whole, rel=0.1), "the same rows in every step, other dropout"
    again = ranks.Script(words, tmp_path / "again")
    assert again.wait() == 0 and "is finished" in again.said()


@pytest.mark.long
@pytest.mark.parametrize(
    ("last", "said"),
    [
        (
            ("--set", "sft.learning_rate=1e-3"),
            "recipe.sft.learning_rate is 0.002 in the first process, 0.001 in process 1",
        ),
        (("--runs", "elsewhere"), "name a folder on a disk that all machines mount with --runs"),
    ],
)
def test_processes_that_were_started_otherwise_are_refused(
    last: tuple[str, str], said: str, tmp_path: Path
) -> None:
    scripts = ranks.start("sft", tmp_path, last=last)
    assert ranks.end(scripts, 90) == [2, 2]
    assert said in " ".join(scripts[1].said().split())
    assert "error" not in scripts[0].said()
    assert RunDir(tmp_path, "tiny", "sft").read_manifest().outcome == "failed"


@pytest.mark.long
def test_two_processes_train_a_reward_model_as_one_does(sft: Stage, tmp_path: Path) -> None:
    few = ("reward.max_steps=3", "reward.learning_rate=1e-3")
    with float32():
        alone = run_stage(tiny(*few), "reward", beside_sft(sft, tmp_path / "one"))
    scripts = ranks.start("reward", beside_sft(sft, tmp_path / "two"), *few, in_all=["float32"])
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    as_one(tmp_path / "two" / "tiny" / "reward", alone.run.path)


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=pytest.mark.campaign)])
def test_two_processes_learn_from_rewards(algorithm: str, sft: Stage, tmp_path: Path) -> None:
    """Each makes its own prompts' completions, so the run is another than one process's; it starts where that does."""
    scripts = ranks.start("rl", beside_sft(sft, tmp_path), *FEW_RL, f"rl.algorithm={algorithm}")
    assert ranks.end(scripts) == [0, 0], ranks.said(scripts)
    steps = [line for line in lines(tmp_path / "tiny" / "rl") if "loss" in line]
    assert len(steps) == 4 and steps[0]["kl"] == 0 and steps[0]["grad_norm"] > 0


@pytest.mark.long
def test_torchrun_ends_with_one_message_and_no_orphan(tmp_path: Path) -> None:
    """The real launcher: a refusal at once, a signal to it saves one checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(ROOT / "run_sft.py"), "--recipe", "tiny", "--runs", str(tmp_path)]
    words = [word for override in (*FEW_ROWS, "sft.max_steps=400") for word in ("--set", override)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(
        [*torchrun, *script, "--set", "sft.nonsense=1"], capture_output=True, text=True, env=environ, cwd=ROOT
    )
    assert refused.returncode != 0 and (refused.stdout + refused.stderr).count("error:") == 1
    said = tmp_path / "said"
    with said.open("w") as stream:
        process = subprocess.Popen(
            [*torchrun, *script, *words], stdout=stream, stderr=stream, env=environ, cwd=ROOT
        )
    deadline = time.monotonic() + 240
    while " 5/400 " not in said.read_text() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) != 0
    run = tmp_path / "tiny" / "sft"
    assert len(saved(run)) == 1 and said.read_text().count("the same command continues from there") == 1
    assert not RunDir(tmp_path, "tiny", "sft").is_held()
