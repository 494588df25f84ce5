"""A Llama's GGUF by the `gguf` package: for whoever has no llama.cpp. Equal to what llama.cpp's converter writes.

Held against `convert_hf_to_gguf.py` of llama.cpp (as vendored by llama-cpp-python 0.3.36) on a small random Llama with
Llama 3's tokenizer and rope scaling: all tensors and vocabulary equal, the rope factors within one ulp of fp32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from tokenizers import Tokenizer

from toolkit.console.screen import bar
from toolkit.data.masking import generation_prompt
from toolkit.data.prompts import as_messages
from toolkit.data.template import ChatTemplate
from toolkit.engine.export import merge
from toolkit.errors import UserError
from toolkit.export.artefact import QUANTS, Wanted

ARCHITECTURE = "LlamaForCausalLM"

# Byte-level pre-tokenizers by the expression that tokenizer.json splits with, as llama.cpp names them
# (src/llama-vocab.cpp). "" is ByteLevel's own expression, GPT-2's.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {LLAMA_3: "llama-bpe", "": "gpt-2"}


def convert(wanted: Wanted, merged: Path, file: Path, dtype: str, console: Console) -> None:
    """Writes a Llama's GGUF with the `gguf` package, one tensor in memory at a time.

    Raises UserError for another architecture, another kind of tokenizer, or a rope scaling that it does not know.
    """
    import gguf

    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] != [ARCHITECTURE] or config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(
            f"without llama.cpp only a plain {ARCHITECTURE} is converted, and this is {config['architectures']}: "
            "name a llama.cpp checkout with --llama-cpp"
        )
    writer = gguf.GGUFWriter(file, "llama")
    rope_factors = _describe(writer, gguf, config, dtype)
    _vocabulary(writer, gguf, wanted, merged, config["vocab_size"], console)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kind = gguf.GGMLQuantizationType[dtype.upper()]

    def stored(name: str, tensor: torch.Tensor) -> np.ndarray:
        values = tensor.float()
        if name.endswith("q_proj.weight"):
            values = _interleave(values, heads)
        elif name.endswith("k_proj.weight"):
            values = _interleave(values, kv_heads)
        if values.dim() == 1:  # norms stay complete
            return values.numpy()
        return gguf.quants.quantize(values.numpy(), kind)

    shards = merge.shards(merged)
    if rope_factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes
        )
    for path, tensors in shards.items():
        with safe_open(merged / path, framework="pt") as stream:
            for name in tensors:
                shape = stream.get_slice(name).get_shape()
                whole = len(shape) == 1
                size = math.prod(shape) * (4 if whole else 2)
                target = names.get_name(name, try_suffixes=(".weight",))
                if target is None:
                    raise UserError(
                        f"{name} has no place in a Llama's GGUF: name a llama.cpp checkout with --llama-cpp"
                    )
                as_type = np.dtype(np.float32) if whole else np.dtype(np.float16)
                writer.add_tensor_info(target, shape, as_type, size, raw_dtype=None if whole else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    with bar(console, "converting", sum(map(len, shards.values()))) as advance:
        for path, tensors in shards.items():
            with safe_open(merged / path, framework="pt") as stream:
                for name in tensors:
                    writer.write_tensor_data(stored(name, stream.get_tensor(name)))
                    advance(1)
    writer.close()


def adds_bos(folder: Path) -> bool:
    """Whether the tokenizer puts BOS in front by itself, as llama.cpp then does too."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("bos_token")
    first = Tokenizer.from_str(json.dumps(raw)).encode("x").tokens[0]
    return bos is not None and first == bos


def _describe(writer: Any, gguf: Any, config: dict[str, Any], dtype: str) -> np.ndarray | None:
    """The model's numbers. Returns the factors of Llama-3's rope scaling, where the model has it."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(QUANTS[dtype])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        return _llama3_rope(rope, theta, head)
    elif kind != "default":
        raise UserError(f"rope scaling {kind!r}: name a llama.cpp checkout with --llama-cpp, which knows it")
    return None


def _llama3_rope(rope: dict[str, Any], theta: float, head: int) -> np.ndarray:
    """What each rope frequency is divided by, (head / 2,) fp32: transformers' `_compute_llama3_parameters`."""
    wave = 2 * math.pi * theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    turns = rope["original_max_position_embeddings"] / wave  # of each frequency in the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads * head, width), from halves (rotate i with i + head/2) to llama.cpp's neighbours."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _vocabulary(writer: Any, gguf: Any, wanted: Wanted, merged: Path, size: int, console: Console) -> None:
    raw = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    if raw["model"]["type"] != "BPE" or raw["normalizer"] or raw["model"].get("byte_fallback"):
        raise UserError(
            "without llama.cpp only byte-level BPE tokenizers (Llama 3's kind) are converted: name a llama.cpp "
            "checkout with --llama-cpp"
        )
    types, tokens = [gguf.TokenType.UNUSED] * size, [f"[PAD{number}]" for number in range(size)]
    for token, number in raw["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    ids = {token: number for number, token in enumerate(tokens)}
    source = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, config.get("bos_token"), config["eos_token"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(raw, wanted, template, console))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = raw["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    if config.get("bos_token"):
        writer.add_bos_token_id(ids[config["bos_token"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_eot_token_id(ids[wanted.recipe.template.end_of_turn])
    writer.add_pad_token_id(ids[wanted.recipe.template.pad_token])
    writer.add_add_bos_token(adds_bos(merged))
    writer.add_chat_template(source)


def _pre_tokenizer(raw: dict[str, Any], wanted: Wanted, template: ChatTemplate, console: Console) -> str:
    """llama.cpp's name for how the tokenizer splits text; else one that splits the recipe's prompts alike, said so."""
    steps = raw["pre_tokenizer"].get("pretokenizers", [raw["pre_tokenizer"]])
    pattern = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), "")
    if pattern in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[pattern]
    texts = [
        generation_prompt(template, as_messages(wanted.recipe, prompt))
        for prompt in wanted.recipe.compare.prompts
    ]
    expected = [_ids(raw, text) for text in texts]
    for known, name in PRE_TOKENIZERS.items():
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not known}
        split = {"type": "Split", "pattern": {"Regex": known}, "behavior": "Isolated", "invert": False}
        other = raw | {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level] if known else [level]}
        }
        if [_ids(other, text) for text in texts] == expected:
            console.print(
                f"[yellow]llama.cpp has no pre-tokenizer that splits text as this tokenizer does; {name} splits "
                f"the recipe's {len(texts)} prompts alike, and other texts may become other tokens[/]"
            )
            return name
    raise UserError(
        f"llama.cpp has no pre-tokenizer that splits text as {wanted.recipe.model.path} does ({pattern!r}): its "
        "prompts would become other tokens than in training"
    )


def _ids(raw: dict[str, Any], text: str) -> list[int]:
    return Tokenizer.from_str(json.dumps(raw)).encode(text, add_special_tokens=False).ids
