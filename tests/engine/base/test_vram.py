"""Memory that is watched while a run goes on, and disk that is looked at before one."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.conftest import Stage, run_stage, tiny
from toolkit import hardware
from toolkit.engine.base import model, vram
from toolkit.engine.train import sft
from toolkit.errors import UserError
from toolkit.hardware import GIB
from toolkit.memory import terms
from toolkit.recipe.load import load
from toolkit.records.marks import AdapterMark
from toolkit.run.rundir import RunDir

ON_GPU = torch.cuda.is_available()


def test_without_a_gpu_nothing_is_claimed(sft: Stage) -> None:
    if ON_GPU:
        return
    assert sft.report["measured_peak_gib"] is None and sft.report["allocator"]["effective"] is None
    assert sft.report["probe"]["peak_gib"] is None
    assert sft.report["probe"]["planned_peak_gib"] == sft.report["planned_peak_gib"]
    assert sft.report["oom_events"] == []
    assert "vram" not in sft.run.metrics.read_text()
    assert set(vram.now_gib().values()) == {None}


def test_each_log_tells_the_peak_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [3.0, 5.0, 4.0]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        memory_allocated=lambda: 2 * GIB,
        memory_reserved=lambda: 6 * GIB,
        mem_get_info=lambda: (9 * GIB, 24 * GIB),
        max_memory_allocated=lambda: peaks[0] * GIB,
        reset_peak_memory_stats=lambda: None,
    )
    monkeypatch.setattr(vram.torch, "cuda", cuda)
    timeline, seen = vram.Timeline(), []
    timeline.on_train_begin(None, None, None)
    for _ in range(3):
        logs: dict[str, Any] = {"loss": 1.0}
        timeline.on_log(None, None, None, logs=logs)
        seen.append((logs["vram_gib"], logs["vram_reserved_gib"], logs["vram_peak_gib"]))
        peaks.append(peaks.pop(0))
    assert seen == [(2.0, 6.0, 3.0), (2.0, 6.0, 5.0), (2.0, 6.0, 4.0)]
    assert timeline.peak_gib == 5.0


def test_answers_get_what_the_card_has_free_less_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B caches 2 x 1,024 x 32 values a token in bf16, 128 KiB, and holds as much again for a moment."""
    architecture = load("llama31_8b").model.architecture
    cache_bytes = 2 * 1024 * 32 * 2
    assert cache_bytes < terms.generation_bytes(architecture) <= 2 * cache_bytes
    if not ON_GPU:
        assert vram.tokens_that_fit(architecture) == math.inf
    cuda = SimpleNamespace(
        is_available=lambda: True, mem_get_info=lambda: ((terms.RESERVE_GIB + 1) * GIB, 24 * GIB)
    )
    monkeypatch.setattr(vram.torch, "cuda", cuda)
    assert vram.tokens_that_fit(architecture) == GIB // terms.generation_bytes(architecture)


def test_an_allocator_that_does_not_tell_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vram.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vram.torch.cuda.memory, "_snapshot", lambda: {})
    assert vram.allocator_settings() is None
    monkeypatch.setattr(
        vram.torch.cuda.memory, "_snapshot", lambda: {"allocator_settings": {"max_split_size": 1}}
    )
    assert vram.allocator_settings() == {"max_split_size": 1}


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    run.path.mkdir(parents=True)
    loaded = SimpleNamespace(model=torch.nn.Linear(1024, 1024))  # 4 MiB of fp32
    monkeypatch.setattr(hardware, "disk_free_gib", lambda path: 0.01)
    with pytest.raises(UserError, match=r"the adapter's files take 0.06 GiB .* has 0.01 GiB free"):
        model.save_adapter(loaded, run, AdapterMark.unknown())  # type: ignore[arg-type]
    assert list(run.path.iterdir()) == []
    monkeypatch.setattr(hardware, "disk_free_gib", lambda path: 0.2)
    model.check_disk(loaded, run, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"and 3 checkpoints take 0.28 GiB .*smaller save_total_limit"):
        model.check_disk(loaded, run, 3)  # type: ignore[arg-type]


def test_a_run_that_the_disk_cannot_hold_stops_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "disk_free_gib", lambda path: 0.01)
    with pytest.raises(UserError, match="the disk of"):
        run_stage(tiny(), "sft", tmp_path)
    assert not (tmp_path / "tiny/sft/metrics.jsonl").exists()


@pytest.mark.gpu
def test_the_allocator_took_what_was_asked_for(sft: Stage) -> None:
    assert sft.report["allocator"]["effective"]["expandable_segments"] is True
    assert 0 < sft.report["probe"]["peak_gib"] <= 1.5 * sft.report["measured_peak_gib"]
    assert "vram_peak_gib" in sft.run.metrics.read_text()


@pytest.mark.gpu
def test_an_error_of_the_allocator_itself_is_recovered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = sft.SFTTrainer.training_step

    def greedy(self, policy, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        loss = training_step(self, policy, inputs, num_items_in_batch)
        if len(inputs["input_ids"]) > 4:
            torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")  # all of the card
        return loss

    monkeypatch.setattr(sft.SFTTrainer, "training_step", greedy)
    done = run_stage(tiny("memory.per_device_train_batch_size=8"), "sft", tmp_path)
    assert done.report["num_steps"] == 4
    (event,) = done.report["oom_events"]
    assert event["free_gib"] > 0 and "out of memory" in event["error"]
