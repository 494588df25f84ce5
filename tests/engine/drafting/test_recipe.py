"""A recipe that is written for a model and rows: complete, explained, and trained by the scripts as it stands."""

import json
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT
from tests.test_setup import EXPLAINED, has_comment, is_list_of_sources
from toolkit.drafting import request
from toolkit.engine.drafting import recipe as drafting
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe

TINY = ROOT / "recipes/tiny"
QWEN3 = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1792,
    "max_position_embeddings": 512,
    "pad_token_id": 6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen3 of random weights beside its tokenizer, and a few rows; the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **QWEN3), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "my qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "base" / name, tmp_path / "my qwen3")
    for name in ("sft", "dpo"):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:120]))
    return tmp_path


def written(*words: str) -> Recipe:
    asked = request.parse("", ["--model", "my qwen3", "--out", "mine.yaml", *words])
    recipe, _ = drafting.write(asked, Console(quiet=True))
    return recipe


BOTH = ("--sft", "sft.jsonl", "--dpo", "dpo.jsonl")


@pytest.mark.campaign
def test_three_commands_lead_from_a_folder_to_an_aligned_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [word for stage in ("sft", "dpo") for word in ("--set", f"{stage}.max_steps=2")]
    few += ["--set", "compare.max_new_tokens=4"]
    for name, *words in (
        ("new", "--model", "my qwen3", *BOTH, "--out", "mine.yaml", *few),
        ("sft", "--recipe", "mine.yaml"),
        ("dpo", "--recipe", "mine.yaml"),
    ):
        script = str(ROOT / f"run_{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *words])
        before = signal.getsignal(signal.SIGTERM)
        runpy.run_path(script, run_name="__main__")
        signal.signal(signal.SIGTERM, before)
    for stage in ("sft", "dpo"):
        assert json.loads((folder / f"runs/mine/{stage}/report.json").read_text())["num_steps"] == 2


def test_every_value_stands_there_with_its_source(folder: Path) -> None:
    recipe = written(*BOTH, "--set", "dpo.beta=0.2")
    text = (folder / "mine.yaml").read_text()
    lines, values = text.splitlines(), YAML().load(text)
    assert {path[1] for path in recipe.unwritten()} == {"datasets"}, "of a set only what is known"
    bare = [
        f"{section}.{key}"
        for section in (*EXPLAINED, "model", "template")
        for key, value in (values[section] or {}).items()
        if not (is_list_of_sources(value) or has_comment(lines, values[section].lc.key(key)[0]))
        and key not in ("architecture", "divergence")
    ]
    assert not bare
    assert recipe.dpo.beta == 0.2 and "beta: 0.2 # given with --set" in text
    assert "sharegpt: 120 of 120 rows are usable" in text
    assert set(recipe.compare.prompts) <= prompts(folder)


def prompts(folder: Path) -> set[str]:
    asked = [json.loads(line)["conversations"][0]["value"] for line in (folder / "sft.jsonl").open()]
    return {*asked, *(json.loads(line)["prompt"] for line in (folder / "dpo.jsonl").open())}


def test_lengths_and_packing_come_from_the_rows_and_the_card(folder: Path) -> None:
    recipe = written("--sft", "sft.jsonl", "--gpu", "RTX 4090")
    assert recipe.gpu == "rtx4090" and recipe.dpo is None
    assert 64 <= recipe.sft.max_length <= 192 and recipe.sft.max_length % 64 == 0
    assert recipe.sft.packing and not recipe.sft.group_by_length
    assert recipe.sft.eval_rows == 6


def change(folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "my qwen3/model.safetensors"
    weights = load_file(file)
    save_file(weights | {name: how(weights[name].clone())}, file, {"format": "pt"})


def test_a_template_whose_tokens_the_model_does_not_know_is_passed_over(folder: Path) -> None:
    assert Path(written("--sft", "sft.jsonl").template.file).name == "llama3.jinja"
    (folder / "mine.yaml").unlink()
    change(
        folder, "lm_head.weight", lambda head: head.index_copy(0, torch.arange(2, 5), head[1000].repeat(3, 1))
    )
    recipe = written("--sft", "sft.jsonl")
    assert Path(recipe.template.file).name == "chatml_text.jinja"
    assert recipe.template.end_of_turn == "<|end_of_text|>"


def test_the_tokenizers_own_template_comes_first(folder: Path) -> None:
    source = (ROOT / "recipes/templates/gemma.jinja").read_text()
    config = folder / "my qwen3/tokenizer_config.json"
    own = source.replace("<start_of_turn>", "<|start_header_id|>").replace("<end_of_turn>", "<|eot_id|>")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": own}))
    recipe = written(*BOTH)
    assert (recipe.template.file, recipe.template.end_of_turn) == ("tokenizer", "<|eot_id|>")
    assert recipe.sft.system_turn == recipe.dpo.system_turn == "merge", "it has no system turn"


def test_what_cannot_be_known_is_asked_for_at_once(folder: Path) -> None:
    config = folder / "my qwen3/config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantised}))
    (folder / "sft.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(UserError) as asked:
        written(*BOTH)
    said = str(asked.value)
    assert "--set model.base_16bit=ID|FOLDER" in said and "fit no chat schema" in said
    assert not (folder / "mine.yaml").exists()


def test_of_a_model_on_the_hub_the_copy_in_4_bits_is_taken_from_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = folder / "hub/models--unsloth--Qwen3-8B-bnb-4bit/snapshots/abc"
    shutil.copytree(folder / "my qwen3", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    config = json.loads((snapshot / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (snapshot / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = written("--model", "Qwen/Qwen3-8B", "--sft", "sft.jsonl")
    assert recipe.model.path == "unsloth/Qwen3-8B-bnb-4bit"
    assert recipe.model.base_16bit == "Qwen/Qwen3-8B"
    assert recipe.model.architecture.hidden_size == 64
    (folder / "mine.yaml").unlink()
    recipe = written("--model", "unsloth/Qwen3-8B-bnb-4bit", "--sft", "sft.jsonl")
    assert recipe.model.base_16bit == "unsloth/Qwen3-8B", "the table's name for what it was made from"


def test_a_model_whose_linears_are_fused_gets_its_own_names(folder: Path) -> None:
    config = AutoConfig.for_model("phi3", **QWEN3)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "my qwen3")
    assert written(*BOTH).lora.target_modules == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def test_a_folder_that_is_no_model(folder: Path) -> None:
    (folder / "my qwen3/config.json").unlink()
    with pytest.raises(UserError, match=re.escape("my qwen3 has no config.json")):
        written("--sft", "sft.jsonl")


def test_an_error_of_set_names_the_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--set dpo.beta: Input should be greater than 0"):
        written(*BOTH, "--set", "dpo.beta=-1")
