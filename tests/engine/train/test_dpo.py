"""DPO on the tiny model: the reference is the SFT policy, and the numbers are those of the paper."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from tests.engine.conftest import Stage, held_out_pairs, run_stage, tiny
from toolkit.engine.base import model
from toolkit.engine.data import cache as row_cache
from toolkit.engine.data import preparation
from toolkit.engine.inference import log_probs
from toolkit.engine.reference import cache, first_step, precompute, proof
from toolkit.engine.train import dpo
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job


def test_training_starts_at_the_sft_policy_with_loss_ln_2(request: pytest.FixtureRequest) -> None:
    done: Stage = request.getfixturevalue("dpo")  # the module has the name
    first = next(json.loads(line) for line in done.run.metrics.read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=2e-3)
    assert "the reference is the policy" in done.shown
    names = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected"
    assert set(names.split()) <= first.keys()
    assert {"loss", "rewards/margins", "rewards/accuracies"} <= done.report["eval"].keys()


def test_no_sft_adapter_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python run_sft.py --recipe tiny"):
        run_stage(tiny(), "dpo", tmp_path)
    assert not (tmp_path / "tiny" / "dpo").exists()


def test_without_an_sft_stage_the_model_itself_is_the_reference(tmp_path: Path) -> None:
    done = run_stage(tiny("sft=null"), "dpo", tmp_path)
    assert done.report["loss_first"] == pytest.approx(math.log(2), abs=1e-3)


def forget_the_copy(name: str, weight: torch.Tensor) -> None:
    """What TRL up to 0.24 did: the base model is the reference."""
    if "lora_B" in name:
        weight.zero_()


def move_one_weight_by_one_bit(name: str, weight: torch.Tensor) -> None:
    if "layers.2.mlp.up_proj.lora_A" in name:
        weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(2.0))


@pytest.mark.parametrize(
    ("spoil", "apart"), [(forget_the_copy, "28 of 56"), (move_one_weight_by_one_bit, "1 of 56")]
)
def test_a_reference_whose_weights_are_not_the_policys_stops_the_run(
    spoil: Callable[[str, torch.Tensor], None],
    apart: str,
    runs_with_sft: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(model, *args):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f".{proof.REF_ADAPTER}." in name:
                    spoil(name, parameter)
        return prove_weights(model, *args)

    prove_weights = proof.prove_weights
    monkeypatch.setattr(proof, "prove_weights", spoiled)
    with pytest.raises(UserError, match=f"the DPO reference is not the policy .* {apart} weights"):
        run_stage(tiny(), "dpo", runs_with_sft)
    assert not (runs_with_sft / "tiny" / "dpo" / "adapter").exists()


def test_a_reference_pass_through_other_weights_than_those_proved_stops_the_run(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the adapter is switched off where the reference's should be on: the base computes the numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs_with_sft / "cache"))
    monkeypatch.setattr(precompute, "use_adapter", lambda model, name: model.disable_adapter())
    with pytest.raises(
        UserError, match=r"the DPO reference is not the policy .* \(expected: 0 within 0.001\), twice"
    ):
        run_stage(tiny(), "dpo", runs_with_sft)
    assert not (runs_with_sft / "tiny" / "dpo" / "adapter").exists()
    assert not any(cache.folder().iterdir()), "no other run shall find these numbers"


def test_logged_loss_and_rewards_are_equation_7_of_rafailov_et_al(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same 8 pairs at every step, so that each log can be computed again from the weights before it."""
    recipe = tiny(
        "dpo.max_rows=8", "dpo.num_train_epochs=4", "dpo.learning_rate=1.0e-3", "dpo.eval_datasets=[]"
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    from transformers import TrainerCallback

    class LogProbsBeforeEachStep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            rows = [
                preparation.TokenizedPair(*(row[key] for key in ids), False)
                for row in trainers[0].train_dataset
            ]
            model.eval()
            seen.append(log_probs.pairs(model, rows, trainers[0].processing_class.pad_token_id))
            model.train()

    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    trainers: list[dpo.TokenisedDPOTrainer] = []
    prove = proof.prove

    def watch(trainer, *args):  # type: ignore[no-untyped-def]
        trainers.append(trainer)
        trainer.add_callback(LogProbsBeforeEachStep())
        return prove(trainer, *args)

    monkeypatch.setattr(proof, "prove", watch)
    done = run_stage(recipe, "dpo", runs_with_sft)
    logs = [
        entry for line in done.run.metrics.read_text().splitlines() if "loss" in (entry := json.loads(line))
    ]
    assert len(logs) == len(seen) == 4
    reference_chosen, reference_rejected = (side.double() for side in seen[0])
    for entry, (chosen, rejected) in zip(logs, seen, strict=True):
        reward_chosen = 0.1 * (chosen.double() - reference_chosen)
        reward_rejected = 0.1 * (rejected.double() - reference_rejected)
        loss = -torch.log(torch.sigmoid(reward_chosen - reward_rejected)).mean().item()
        assert entry["loss"] == pytest.approx(loss, abs=5e-3)
        assert entry["rewards/chosen"] == pytest.approx(reward_chosen.mean().item(), abs=1e-2)
        assert entry["rewards/rejected"] == pytest.approx(reward_rejected.mean().item(), abs=1e-2)
        assert entry["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=5e-3)
    assert logs[-1]["loss"] < 0.6


def test_log_probs_of_a_reply_are_those_of_a_plain_forward_pass_token_by_token() -> None:
    recipe = tiny()
    loaded = model.load(recipe, 256)
    loaded.model.eval()
    rows = held_out_pairs(recipe, loaded)[:4]
    together = log_probs.pairs(loaded.model, rows, loaded.tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        for reply, values in ((row.chosen_ids, together[0]), (row.rejected_ids, together[1])):
            tokens = torch.tensor([row.prompt_ids + reply])
            with torch.no_grad():
                predicted = loaded.model(input_ids=tokens).logits[0].double().log_softmax(-1)
            start = len(row.prompt_ids)
            one_by_one = sum(predicted[start + place - 1, token].item() for place, token in enumerate(reply))
            assert values[index].item() == pytest.approx(one_by_one, rel=5e-3)


def test_the_policy_is_the_sft_adapter_bit_for_bit_when_training_begins(
    sft: Stage, runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    class Stop(Exception):
        pass

    def look(trainer):  # type: ignore[no-untyped-def]
        drop(trainer)
        saved = load_file(sft.run.adapter / "adapter_model.safetensors")
        policy = {
            name.replace(".default", ""): value
            for name, value in trainer.model.named_parameters()
            if ".default." in name
        }
        assert list(trainer.model.peft_config) == ["default"]
        assert saved.keys() == policy.keys()
        assert all(torch.equal(saved[name], policy[name]) for name in saved)
        raise Stop

    drop = proof.drop
    monkeypatch.setattr(proof, "drop", look)
    recipe = tiny()
    with pytest.raises(Stop):
        dpo.run(
            Job(
                recipe,
                plan_stage(recipe, "dpo", None, 16),
                RunDir(runs_with_sft, "tiny", "dpo"),
                Console(quiet=True),
            )
        )


def test_the_first_step_shows_no_margin_or_the_run_stops(
    dpo: Stage, runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof runs its own batches; the step's are others, and differ by the noise of bf16 alone."""
    shown = dpo.report["reference"]["first_step"]
    assert abs(shown["margin"]) < shown["margin_limit"] <= 0.1
    assert shown["loss"] == pytest.approx(math.log(2), abs=0.01)
    monkeypatch.setattr(first_step, "LIMIT_HALF", -1.0)  # as if no margin at all were noise
    monkeypatch.setattr(first_step, "LIMITS", {})
    with pytest.raises(
        UserError,
        match=r"the first step shows a reward margin of .* \(expected: 0 within -0.1 and ln 2 =",
    ):
        run_stage(tiny(), "dpo", runs_with_sft)
    assert not RunDir(runs_with_sft, "tiny", "dpo").adapter.exists()


def test_the_reference_is_kept_outside_the_prepared_rows(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs_with_sft / "cache"))
    recipe = tiny("dpo.max_steps=1", "dpo.group_by_length=true")
    run_stage(recipe, "dpo", runs_with_sft)
    entries = runs_with_sft / "cache" / "finetune-toolkit" / "data"
    for index in entries.glob(f"*/{row_cache.INDEX}"):
        named = {index.parent / file for file in json.loads(index.read_text())["files"]}
        assert {file for file in index.parent.rglob("*") if file.is_file()} == {index, *named}


def test_rows_that_the_trainer_would_read_otherwise_than_they_were_prepared_stop_the_run(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(*args: Any) -> Dataset:
        rows = add(*args)
        names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
        return rows.rename_columns(names)

    add = precompute._Order.rows_with_log_probs
    monkeypatch.setattr(precompute._Order, "rows_with_log_probs", swapped)
    monkeypatch.setattr(proof.Proof, "holds", True)
    with pytest.raises(UserError, match="not those that were prepared"):
        run_stage(tiny("dpo.max_steps=1"), "dpo", runs_with_sft)
