"""A reward model on the tiny model: where it starts, what it scores, and that neither kills nor pieces change it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.conftest import ROOT
from tests.engine.conftest import Stage, float32, run_stage, stopped_in_the_fourth_step, tiny, weights
from toolkit.engine.base import model, score_head
from toolkit.engine.export import export, parity
from toolkit.engine.inference import reward_model
from toolkit.engine.train import reward as reward_stage
from toolkit.engine.train import stage
from toolkit.errors import UserError
from toolkit.export.artefact import Wanted
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

BASE = ROOT / "recipes" / "tiny" / "base"
FEW = ("reward.max_steps=5", "reward.save_steps=2", "reward.learning_rate=1e-3")


def conversations(num: int) -> list[list[dict[str, str]]]:
    rows = [
        json.loads(line) for line in (ROOT / "recipes/tiny/dpo_eval.jsonl").read_text().splitlines()[:num]
    ]
    return [row[side] for row in rows for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def done(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A few steps from the SFT adapter that nothing disturbed."""
    runs = tmp_path_factory.mktemp("reward")
    (runs / "tiny").mkdir()
    (runs / "tiny" / "sft").symlink_to(sft.run.path)
    return run_stage(tiny(*FEW), "reward", runs)


@pytest.fixture(scope="module")
def loaded(done: Stage) -> reward_model.RewardModel:
    return reward_model.load(str(done.run.path))


def test_it_starts_from_the_sft_weights_and_a_head_of_the_seed(sft: Stage) -> None:
    heads = []
    for seed in (3407, 3407, 1):
        recipe = tiny(f"seed={seed}")
        torch.manual_seed(len(heads))  # what was drawn before must not matter
        fresh = model.load(recipe, 256, task="seq_cls")
        model.attach_lora(fresh, recipe, plan_stage(recipe, "reward", None, 16).settings, 256)
        heads.append(score_head.weight_of(fresh.model).clone())
    model.load_adapter(fresh.model, sft.run.adapter)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(score_head.weight_of(fresh.model), heads[2]), "SFT has no head to bring"
    saved = load_file(sft.run.adapter / "adapter_model.safetensors")
    named = {name.replace(".default", ""): value for name, value in fresh.model.named_parameters()}
    assert all(torch.equal(named[name], value) for name, value in saved.items())
    assert {parameter.dtype for parameter in model.trainable(fresh.model)} == {torch.float32}


def test_its_report_says_how_it_tells_held_out_pairs_apart(done: Stage) -> None:
    assert done.report["loss_last"] < done.report["loss_first"]
    scores = done.report["scores"]
    assert scores["accuracy"]["num_rows"] == 96 and scores["accuracy"]["low"] <= scores["accuracy"]["value"]
    assert set(scores["by_source"]) == {f"thistle_isles/{style}" for style in ("plain", "curt", "rambling")}
    assert scores["accuracy_chosen_shorter"]["num_rows"] + scores["accuracy_chosen_longer"]["num_rows"] <= 96
    assert -1 <= scores["length_correlation"]["value"] <= 1
    assert scores["margin"]["value"] == pytest.approx(done.report["eval"]["margin"], abs=0.02)
    assert done.report["answers"] is None and "held-out accuracy" in done.shown
    assert "Held-out pairs" in done.run.page.read_text()
    names = "accuracy margin min_reward mean_reward max_reward num_tokens"
    assert set(names.split()) <= json.loads(done.run.metrics.read_text().splitlines()[0]).keys()


@pytest.mark.long
def test_stopped_in_a_step_it_ends_with_the_same_bits(done: Stage, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "sft").symlink_to(done.run.of("sft").path.resolve())
    with stopped_in_the_fourth_step():
        run_stage(tiny(*FEW), "reward", tmp_path)
    again = run_stage(tiny(*FEW), "reward", tmp_path)
    assert "continuing at step 2 of 5" in again.shown
    assert weights(again) == weights(done)
    assert again.report["train_tokens"] == done.report["train_tokens"]
    assert again.report["scores"]["margin"] == done.report["scores"]["margin"]


def test_in_pieces_it_is_the_same_gradient_and_the_same_log(done: Stage, tmp_path: Path) -> None:
    class Built(Exception):
        pass

    def take(*args: Any) -> None:
        raise Built(reward_stage.build(*args))

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "sft").symlink_to(done.run.of("sft").path.resolve())
    recipe = tiny(*FEW, "memory.per_device_train_batch_size=8")
    job = Job(
        recipe,
        plan_stage(recipe, "reward", None, 16),
        RunDir(tmp_path, "tiny", "reward"),
        Console(quiet=True),
    )
    with float32(), pytest.raises(Built) as built:
        stage.run(job, take)  # type: ignore[arg-type]
    trainer = built.value.args[0]
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[index] for index in range(6)]
    gradients, logs = [], []
    for pieces in (1, 2):
        trainer.model.train()
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        trainer.recovery.split["train"] = pieces
        trainer.training_step(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
        trained = model.trainable(trainer.model)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        logs.append(
            {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        )
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.01
    assert logs[1] == pytest.approx(logs[0], abs=0.02) and logs[0]["min_reward"] < logs[0]["max_reward"]


def test_what_is_loaded_scores_as_it_was_measured(done: Stage, loaded: reward_model.RewardModel) -> None:
    scores = loaded.score(conversations(96))
    margin = (scores[0::2] - scores[1::2]).mean().item()
    assert margin == pytest.approx(done.report["scores"]["margin"]["value"], abs=0.02)
    alone = torch.cat([loaded.score([one]) for one in conversations(4)])
    assert torch.allclose(alone, loaded.score(conversations(4), batch_tokens=256), atol=0.02)
    assert loaded.score([]).shape == (0,)


@pytest.mark.parametrize("kind", ["adapter", pytest.param("merged_16bit", marks=pytest.mark.campaign)])
def test_an_export_gives_the_same_scores_where_others_load_it(kind: Any, done: Stage, tmp_path: Path) -> None:
    wanted = Wanted(done.recipe, done.run, kind, None, tmp_path / "made", True, None)
    ask = parity.in_fresh_process if kind == "merged_16bit" else parity.in_this_process
    measured = export.run(wanted, Console(quiet=True), ask)
    assert measured is not None and measured.passed
    assert "ForSequenceClassification" in (wanted.folder / "README.md").read_text()
    if kind == "merged_16bit":
        ours = reward_model.load(str(wanted.folder))
        plain = AutoModelForSequenceClassification.from_pretrained(
            wanted.folder, dtype=ours.model.dtype
        ).eval()
        with torch.no_grad():
            expected = [
                plain(input_ids=torch.tensor([ids])).logits.item() for ids in ours.encode(conversations(2))
            ]
        assert ours.score(conversations(2)).tolist() == pytest.approx(expected, abs=0.05)
        config = json.loads((wanted.folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
        assert not {"lm_head.weight"} & load_file(wanted.folder / "model.safetensors").keys()


def test_a_reward_model_from_elsewhere_keeps_its_own_tokenizer_and_pad(tmp_path: Path) -> None:
    """One without a pad token, as some on the Hub are: a row at a time, as transformers itself scores it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1800,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
    )
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with pytest.raises(UserError, match="ships no chat template"):
        tokenizer.save_pretrained(tmp_path)
        reward_model.load(str(tmp_path))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    ours = reward_model.load(str(tmp_path))
    rows = ours.encode(conversations(2))
    with torch.no_grad():
        expected = torch.cat([theirs(input_ids=torch.tensor([ids])).logits[:, 0] for ids in rows])
    assert torch.allclose(ours.score(conversations(2)), expected, atol=0.05)
    with pytest.raises(UserError, match="longer than the 2,048 positions"):
        ours.score([[{"role": "user", "content": "word " * 3000}]])


def test_what_is_no_reward_model_is_refused(sft: Stage, done: Stage, tmp_path: Path) -> None:
    for path, said in (
        (sft.run.path, "it gives no score"),
        (BASE, r"LlamaForCausalLM with 2 labels; expected is one of ...ForSequenceClassification with 1"),
        (tmp_path, "no reward model"),
    ):
        with pytest.raises(UserError, match=said):
            reward_model.load(str(path))
    copy = tmp_path / "damaged"
    shutil.copytree(done.run.adapter, copy)
    (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + " ")
    with pytest.raises(UserError, match="is damaged"):
        reward_model.load(str(copy))


def test_a_pad_that_ends_turns_is_refused() -> None:
    with pytest.raises(UserError, match="is also an end token"):
        model.load(tiny("template.pad_token=<|eot_id|>"), 256, task="seq_cls")
