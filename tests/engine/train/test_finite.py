"""A loss or gradient that is no number ends the run, with its last good checkpoint kept; it is never finished."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import run_stage, tiny
from toolkit.engine.train import finite
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.errors import UserError
from toolkit.run.rundir import RunDir


def ends(run: RunDir, *overrides: str) -> str:
    """What a run says that has to fail, once what it left was looked at."""
    with pytest.raises(UserError) as error:
        run_stage(tiny("sft.max_steps=6", *overrides), run.stage, run.root)
    assert run.read_manifest().outcome == "failed" and run.finished_with() is None
    assert json.loads(run.report.read_text())["outcome"] == "failed"
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values()), checkpoint
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("logging_steps", "save_steps"), [(1, 2), (100, 1), (4, 100)])
def test_the_step_and_the_rows_of_a_loss_that_is_no_number_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, logging_steps: int, save_steps: int
) -> None:
    compute, seen = OutOfMemoryRecovery.compute_loss, []

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 2 and model.training and not seen:
            seen.append(self.processing_class.decode(inputs["input_ids"][0][:24]))
            return loss * value
        return loss

    monkeypatch.setattr(OutOfMemoryRecovery, "compute_loss", broken)
    run = RunDir(tmp_path, "tiny", "sft")
    said = ends(run, f"sft.logging_steps={logging_steps}", f"sft.save_steps={save_steps}")
    assert "went wrong at step 3: " in said and "--fresh" in said and "Lower learning_rate" in said
    assert re.search(r"rows: prepared row \d+ \(", said) and repr(seen[0]) in said
    kept = (
        "No checkpoint was saved yet" if save_steps == 100 else "The last good checkpoint, of step 2, is kept"
    )
    assert kept in said


def test_a_gradient_norm_that_is_no_number_is_found_where_the_loss_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = OutOfMemoryRecovery.training_step

    def broken(self: Any, model: Any, *args: Any) -> Any:
        loss = step(self, model, *args)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        return loss

    monkeypatch.setattr(OutOfMemoryRecovery, "training_step", broken)
    said = ends(RunDir(tmp_path, "tiny", "sft"), "sft.save_steps=1")
    assert "went wrong at step 3: grad_norm is" in said and "of step 2, is kept" in said


def test_a_loss_out_of_its_range_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = OutOfMemoryRecovery.compute_loss

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, *args, **kwargs)
        return loss * 10 if self.state.global_step >= 2 and model.training else loss

    monkeypatch.setattr(OutOfMemoryRecovery, "compute_loss", broken)
    run = RunDir(tmp_path, "tiny", "sft")
    limits = ("sft.divergence.factor=4", "sft.divergence.patience=2")
    said = ends(run, "sft.save_steps=1", "sft.save_total_limit=1", *limits)
    assert "went wrong at step 4: the loss has left its range" in said and "is more than 4 times" in said
    assert "of step 2, is kept" in said and (run.checkpoints / "checkpoint-2").is_dir()
    assert "rows:" not in said and "warmup_steps" in said


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit"])  # on a CPU the second is not paged
def test_states_of_8_bits_are_looked_at_too(kind: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(400, 300)
    optimizer = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3)
    model(torch.ones(1, 400)).sum().backward()
    optimizer.step()
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=1e-3, max_grad_norm=1.0)
    trainer = SimpleNamespace(
        model=model,
        optimizer=optimizer,
        args=args,
        ran=[],
        state=SimpleNamespace(global_step=1, log_history=[]),
        divergence=None,
    )
    finite.check_weights(trainer)
    state = optimizer.state[model.weight]
    assert state["state1"].dtype == torch.uint8
    state["absmax1"][0] = torch.nan
    with pytest.raises(UserError, match="the optimizer's state is NaN or infinite"):
        finite.check_weights(trainer)


def test_a_learning_rate_that_is_far_too_high_is_what_it_says(tmp_path: Path) -> None:
    assert "of 1e+30" in ends(RunDir(tmp_path, "tiny", "sft"), "sft.learning_rate=1.0e+30")
