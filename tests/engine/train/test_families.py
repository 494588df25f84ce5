"""Every family that is served: random weights, our tokenizer, SFT and then DPO of two steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS, run_stage
from toolkit.engine.base.model import architecture_of
from toolkit.engine.export import merge
from toolkit.errors import UserError
from toolkit.memory import terms
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections import LINEARS

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1792,
    "max_position_embeddings": 512,
    "pad_token_id": 6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FEW = (
    *FEW_ROWS,
    "sft.max_steps=2",
    "dpo.max_steps=2",
    "sft.max_rows=16",
    "dpo.max_rows=16",
    "sft.eval_datasets=[]",
    "dpo.eval_datasets=[]",
    "dpo.learning_rate=1e-3",
    "compare.questions=null",
    "compare.prompts=[Who?]",
    "compare.max_new_tokens=2",
)
# Family -> what its config has beside SMALL
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 32, "sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "sliding_window": 64},
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 300},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "olmo2": {},
    "cohere": {"logit_scale": 0.0625},
}
IN_EVERY_SUITE = ("phi3",)  # fused linears; the others take their turn with what is long


def folder_of(family: str, folder: Path, **changed: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | changed))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes/tiny/base" / name, folder)
    return folder


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    architecture = architecture_of(AutoConfig.from_pretrained(folder))
    model = {"path": str(folder), "architecture": architecture}
    return load("tiny", (*FEW, f"model={json.dumps(model)}", *overrides))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in IN_EVERY_SUITE else pytest.mark.campaign)
        for family in FAMILIES
    ],
)
def test_a_family_is_trained_proved_and_merged(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / family, **FAMILIES[family])
    recipe = recipe_of(folder)
    sft, dpo = (run_stage(recipe, stage, tmp_path / "runs") for stage in ("sft", "dpo"))
    assert sft.report["num_steps"] == dpo.report["num_steps"] == 2
    assert "the reference is the policy" in dpo.shown, "or the run had stopped"
    assert abs(dpo.report["loss_first"] - 0.6931) < 1e-3

    modules = {name.split(".")[-3] for name in load_file(dpo.run.adapter / "adapter_model.safetensors")}
    if family == "phi3":
        assert modules == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert "one linear, qkv_proj, for q_proj, k_proj, v_proj" in sft.shown
    else:
        assert modules == set(LINEARS)
    the_plan_knows_its_sizes(recipe, folder, dpo.run.adapter)
    the_merge_is_exact(folder, dpo.run.adapter, tmp_path / "merged")


def the_plan_knows_its_sizes(recipe: Recipe, folder: Path, adapter: Path) -> None:
    """But for biases and the norms that a family has beside two a layer."""
    of, weights = recipe.model.architecture, load_file(folder / "model.safetensors")
    matrices = sum(2 * tensor.numel() for tensor in weights.values() if tensor.ndim == 2)
    norms = terms.BF16 * of.hidden_size * (2 * of.num_hidden_layers + 1)
    assert terms.layer_weight_bytes(of, False) - norms + terms.embedding_bytes(of) == matrices
    trained = load_file(adapter / "adapter_model.safetensors")
    named = sorted({name.split(".")[-3] for name in trained})
    lora = recipe.lora.model_copy(update={"target_modules": tuple(named)})
    assert terms.lora_parameters(of, lora) == sum(tensor.numel() for tensor in trained.values())


def the_merge_is_exact(folder: Path, adapter: Path, target: Path) -> None:
    target.mkdir()
    merge.merge(folder, merge.read_lora(adapter), target)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = load_file(target / "model.safetensors")
    assert any("_proj" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_a_module_that_the_model_lacks_is_an_error_with_its_own_names(tmp_path: Path) -> None:
    folder = folder_of("phi3", tmp_path / "phi3")
    fused = recipe_of(folder, "lora.target_modules=[qkv_proj, o_proj]", "dpo=null")
    assert terms.lora_parameters(fused.model.architecture, fused.lora) == 2 * 16 * ((64 + 128) + (64 + 64))
    folder = folder_of("llama", tmp_path / "llama")
    with pytest.raises(
        UserError, match=r"has no qkv_proj; its linears are down_proj, gate_proj, k_proj, o_proj"
    ):
        run_stage(recipe_of(folder, "lora.target_modules=[qkv_proj, o_proj]"), "sft", tmp_path / "runs")


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = folder_of("qwen3_moe", tmp_path / "moe", **experts)
    with pytest.raises(UserError, match=r"is a mixture of 4 experts \(qwen3_moe\)"):
        run_stage(recipe_of(folder), "sft", tmp_path / "runs")
