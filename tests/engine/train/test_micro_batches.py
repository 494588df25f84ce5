"""Micro-batches by tokens: the same training as by rows, in pieces that no row count decides."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.engine.conftest import float32, run_stage, start, tiny, wait_for, weights
from toolkit.engine.base.micro_batches import MicroBatches, Row, pair_lengths, row_tokens

counts = st.integers(1, 30)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    if draw(st.booleans()):
        return [{"input_ids": [0] * draw(counts)} for _ in range(draw(st.integers(1, 20)))]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: [0] * draw(counts) for name in names} for _ in range(draw(st.integers(1, 20)))]


@given(rows(), st.integers(1, 400), st.booleans(), st.sampled_from([1, 2, 4]))
def test_no_piece_holds_more_tokens_than_it_may_but_for_a_single_row(
    batch: list[Row], tokens: int, shares: bool, split: int
) -> None:
    cut = MicroBatches(tokens, shares and "prompt_ids" in batch[0])
    left, seen = cut.ordered(batch), list[Row]()
    while left:
        size = cut.first(left, len(batch), split)
        some, left = left[:size], left[size:]
        sequences = 1 if "input_ids" in batch[0] else 2
        padded = sequences * len(some) * max(map(row_tokens, some))
        run = sum(sum(pair_lengths(row)) for row in some) if cut.shares_prompts else padded
        assert run <= tokens / split or len(some) == 1
        seen += some
    assert sorted(map(id, seen)) == sorted(map(id, batch))


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.long)])
def test_many_small_pieces_train_as_one_batch_does(stage: str, runs_with_sft: Path) -> None:
    def trained(name: str, tokens: int) -> tuple[dict[str, torch.Tensor], float]:
        runs = runs_with_sft / name
        (runs / "tiny").mkdir(parents=True)
        if stage == "dpo":
            (runs / "tiny" / "sft").symlink_to((runs_with_sft / "tiny" / "sft").resolve())
        few = (f"{stage}.max_steps=2", f"{stage}.eval_datasets=[]", f"memory.tokens_per_micro_batch={tokens}")
        with float32():
            done = run_stage(tiny(*few), stage, runs)
        return load_file(done.run.adapter / "adapter_model.safetensors"), done.report["loss_last"]

    (whole, loss), (cut, loss_of_pieces) = trained("whole", 100_000), trained("cut", 150)
    assert loss_of_pieces == pytest.approx(loss, abs=2e-3)
    distance = sum((whole[name] - cut[name]).square().sum() for name in whole) ** 0.5
    assert distance <= 0.02 * sum(one.square().sum() for one in whole.values()) ** 0.5


@pytest.mark.long
def test_a_signal_between_two_pieces_drops_the_step_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    values = (
        *("sft.max_steps=3", "sft.eval_datasets=[]", "sft.save_steps=1", "lora.lora_dropout=0.1"),
        "memory.tokens_per_micro_batch=64",
    )
    undisturbed = run_stage(tiny(*values), "sft", tmp_path / "whole")
    stopped = tmp_path / "stopped" / "tiny" / "sft"
    metrics = stopped / "metrics.jsonl"
    script = start("sft", tmp_path / "stopped", *values)
    wait_for(script, lambda: metrics.exists() and '"step": 1' in metrics.read_text())
    script.terminate()
    assert script.wait() == 143, script.said()
    script = start("sft", tmp_path / "stopped", *values)
    assert script.wait() == 0, script.said()
    assert weights(stopped) == weights(undisturbed)
