"""The probe: it finds out early, and leaves no trace."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.engine.conftest import Stage, run_stage, tiny
from tests.engine.train.test_oom import again
from toolkit.engine.base import micro_batches, recompute, vram
from toolkit.engine.train import dpo, pieces, probe, sft
from toolkit.errors import UserError

DROPOUT = ("sft.max_rows=32", "lora.lora_dropout=0.1", "memory.per_device_train_batch_size=8")


def adapter(stage: Stage) -> bytes:
    return (stage.run.adapter / "adapter_model.safetensors").read_bytes()


def metrics(stage: Stage) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in stage.run.metrics.read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith(("runtime", "per_second", "checkpoint_seconds"))
        }
        for line in lines
    ]


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.campaign)])
def test_the_final_weights_are_bitwise_those_of_a_run_without_it(
    stage: str, runs_with_sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = DROPOUT if stage == "sft" else ("dpo.max_rows=16",)
    probed = run_stage(tiny(*overrides), stage, runs_with_sft if stage == "dpo" else tmp_path / "probed")
    kept = adapter(probed), metrics(probed)
    monkeypatch.setattr(probe.Probe, "on_train_begin", lambda *args, **kwargs: None)
    bare = run_stage(
        tiny(*overrides), stage, again(runs_with_sft, tmp_path) if stage == "dpo" else tmp_path / "bare"
    )
    assert bare.report["probe"] is None and probed.report["probe"]["events"] == 0
    assert adapter(bare) == kept[0]
    assert metrics(bare) == kept[1]


def test_it_runs_the_longest_micro_batch_and_draws_no_random_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    run = probe.run

    def draw(trainer: Any, rows: list[dict[str, Any]]) -> None:
        lengths = sorted(trainer.train_dataset["length"], reverse=True)
        assert sorted((len(row["input_ids"]) for row in rows), reverse=True) == lengths[:8]
        run(trainer, rows)
        assert all(weight.grad is not None for weight in trainer.model.parameters() if weight.requires_grad)
        seen.append([random.random(), np.random.rand(), torch.rand(1).item()])

    unchanged = probe.unchanged

    def watch(trainer: Any) -> Any:
        seen.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        return unchanged(trainer)

    def after(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        assert now == seen[0] and len(seen) == 2
        assert all(weight.grad is None for weight in model.parameters())

    monkeypatch.setattr(probe, "run", draw)
    monkeypatch.setattr(probe, "unchanged", watch)
    monkeypatch.setattr(vram.Timeline, "on_train_begin", after)  # the next callback
    run_stage(tiny(*DROPOUT), "sft", tmp_path)


def test_what_does_not_fit_steps_down_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = sft.SFTTrainer.training_step

    def scarce(self, policy, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return training_step(self, policy, inputs, num_items_in_batch)

    monkeypatch.setattr(sft.SFTTrainer, "training_step", scarce)
    done = run_stage(tiny(*DROPOUT), "sft", tmp_path)
    assert [event["where"] for event in done.report["oom_events"]] == ["probe", "probe"], (
        "training meets none"
    )
    assert done.report["probe"]["split_factor"] == 4 and done.report["probe"]["rows"] == 8
    assert "out of memory (probe, step 1): train batches now run in pieces of 2" in done.shown


@pytest.mark.campaign
def test_a_single_pair_that_does_not_fit_recomputes_all_layers_in_the_whole_run(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss, flags = dpo.DPOTrainer.compute_loss, []

    def scarce(self, policy, inputs, **kwargs):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            if recompute.num_recomputing(policy) < 4 or len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            flags.append(recompute.num_recomputing(policy))
        return compute_loss(self, policy, inputs, **kwargs)

    monkeypatch.setattr(dpo.DPOTrainer, "compute_loss", scarce)
    done = run_stage(tiny("dpo.max_rows=16", "memory.recompute_layers=none"), "dpo", runs_with_sft)
    assert {event["where"] for event in done.report["oom_events"]} == {"probe"}
    assert set(flags) == {4} and done.report["probe"]["recompute_layers"] == 4
    assert "probe: 4 of 4 layers recompute in this run" in done.shown


def test_nothing_to_step_down_to_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self, policy, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

    monkeypatch.setattr(sft.SFTTrainer, "training_step", never)
    with pytest.raises(UserError, match=r"out of memory \(probe, step 1\) with a single row of \d+ tokens"):
        run_stage(tiny(*DROPOUT), "sft", tmp_path)
    assert not (tmp_path / "tiny/sft/checkpoints/checkpoint-0").exists()


def test_the_mixin_comes_before_the_trainer() -> None:
    for trainer, upstream in (
        (sft.RecoveringSFTTrainer, sft.SFTTrainer),
        (dpo.TokenisedDPOTrainer, dpo.DPOTrainer),
    ):
        order = trainer.__mro__
        assert order.index(pieces.OutOfMemoryRecovery) < order.index(upstream)


def test_the_longest_rows_of_a_set_are_found_by_length_or_by_ids() -> None:
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]], "length": [1, 3, 2]})
    assert [len(row["input_ids"]) for row in micro_batches.longest(rows, 2)] == [3, 2]
    assert [len(row["input_ids"]) for row in micro_batches.longest(rows.remove_columns("length"), 5)] == [
        3,
        2,
        1,
    ]
