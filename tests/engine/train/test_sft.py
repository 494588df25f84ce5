"""SFT on the tiny model: what is trained, what is written, what stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import Stage, run_stage, tiny
from toolkit.engine.base import model
from toolkit.engine.data import preparation
from toolkit.engine.train.dpo import DPOTrainer
from toolkit.engine.train.sft import SFTTrainer
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.run.sealing import MARK


def loaded_tiny(*overrides: str, lora: bool = True) -> tuple[model.LoadedModel, object]:
    recipe = tiny(*overrides)
    settings = plan_stage(recipe, "sft", None, 16).settings
    loaded = model.load(recipe, recipe.section("sft").max_length, settings)
    if lora:
        model.attach_lora(loaded, recipe, settings, recipe.section("sft").max_length)
    return loaded, recipe


def test_the_report_and_the_files_are_those_the_readme_names(sft: Stage) -> None:
    keys = "stage outcome device num_steps wall_seconds train_seconds train_tokens loss_first loss_last"
    assert set(keys.split()) <= sft.report.keys()
    assert json.loads(sft.run.report.read_text()) == sft.report
    assert sft.report["num_steps"] == 4 and sft.report["device"] == model.device_name()
    names = {path.name for path in sft.run.adapter.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        MARK,
    } <= names
    metrics = [json.loads(line) for line in sft.run.metrics.read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= metrics[0].keys()
    assert any("eval_loss" in entry for entry in metrics)
    made = json.loads(sft.run.manifest.read_text())
    assert made["outcome"] == "finished" and made["num_steps"] == 4 and made["packages"]["unsloth"]


def test_the_tuned_model_can_stop(sft: Stage) -> None:
    config = json.loads((sft.run.adapter / "generation_config.json").read_text())
    vocabulary = json.loads((sft.run.adapter / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    assert set(config["eos_token_id"]) == {ids["<|end_of_text|>"], ids["<|eot_id|>"]}
    assert config["pad_token_id"] == ids["<|finetune_right_pad_id|>"]


def test_the_base_is_nf4_and_the_lora_is_fp32_before_and_after_trl_has_seen_it() -> None:
    from bitsandbytes.nn import Linear4bit
    from trl import SFTConfig, SFTTrainer

    from toolkit.training import trainer_args

    loaded, recipe = loaded_tiny()
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7 * recipe.model.architecture.num_hidden_layers  # type: ignore[attr-defined]
    assert all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    weights = model.trainable(loaded.model)
    before = [weight.detach().clone() for weight in weights]
    prepared = preparation.prepare(
        recipe, recipe.section("sft"), "chat", loaded, pytest.importorskip("rich.console").Console(quiet=True)
    )
    with model.keep_float32(loaded.model):
        SFTTrainer(
            model=loaded.model,
            args=SFTConfig(
                **trainer_args.sft(recipe, plan_stage(recipe, "sft", None, 16).settings, "/nonexistent")
            ),  # type: ignore[arg-type]
            train_dataset=prepared.train,
            processing_class=loaded.tokenizer,
        )
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


def test_a_pad_token_that_is_an_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="never learn to stop"):
        loaded_tiny("template.pad_token='<|eot_id|>'", lora=False)


def test_tokens_that_the_tokenizer_lacks_are_named_together() -> None:
    with pytest.raises(UserError) as error:
        loaded_tiny("template.pad_token='<pad>'", "template.end_of_turn='<end>'", lora=False)
    assert len(error.value.problems) == 2


def test_an_architecture_that_is_not_the_models_is_refused_before_the_weights_are_read() -> None:
    with pytest.raises(UserError, match="num_hidden_layers: the recipe says 7"):
        loaded_tiny("model.architecture.num_hidden_layers=7", lora=False)


def test_a_saved_adapter_comes_back_bit_for_bit_and_another_shape_is_refused(sft: Stage) -> None:
    from safetensors.torch import load_file

    loaded, _ = loaded_tiny()
    model.load_adapter(loaded.model, sft.run.adapter)
    saved = load_file(sft.run.adapter / "adapter_model.safetensors")
    now = {
        name.replace(".default", ""): value
        for name, value in loaded.model.named_parameters()
        if "lora_" in name
    }
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[name], now[name]) for name in saved)
    other, _ = loaded_tiny("lora.r=8")
    with pytest.raises(UserError, match="does not fit the recipe's lora section"):
        model.load_adapter(other.model, sft.run.adapter)


def test_the_same_seed_gives_the_same_weights(sft: Stage, tmp_path) -> None:  # type: ignore[no-untyped-def]
    again = run_stage(tiny(), "sft", tmp_path)
    first, second = ((stage.run.adapter / "adapter_model.safetensors").read_bytes() for stage in (sft, again))
    assert first == second


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tokens_are_counted_where_the_trainer_leaves_it_to_us(
    stage: str, sft: Stage, dpo: Stage, runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth's SFT trainer for GPUs takes transformers' own loss, which counts nothing; both come to TRL's sum."""
    owner: Any = {"sft": SFTTrainer, "dpo": DPOTrainer}[stage]
    counting = owner.compute_loss

    def silent(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counted, logged = self._total_train_tokens, dict(self._metrics["train"])
        loss = counting(self, model, inputs, *args, **kwargs)
        self._total_train_tokens = counted
        self._metrics["train"].pop("num_tokens", None)
        self._metrics["train"].update({"num_tokens": logged["num_tokens"]} if "num_tokens" in logged else {})
        return loss

    expected = (sft if stage == "sft" else dpo).report["train_tokens"]
    monkeypatch.setattr(owner, "compute_loss", silent)
    if stage == "sft":
        (runs_with_sft / "tiny" / "sft").unlink()
    done = run_stage(tiny(), stage, runs_with_sft)
    assert done.report["train_tokens"] == expected > 0
    speeds = [json.loads(line).get("tokens_per_second") for line in done.run.metrics.read_text().splitlines()]
    assert any(speeds)
