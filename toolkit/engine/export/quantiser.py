"""Quantises a merged model with llm-compressor. A program of its own: `python -P quantiser.py <REQUEST`.

It is run by path in a fresh process and imports nothing of this toolkit: Unsloth rewrites transformers in the process
that it is imported into, and llm-compressor traces the model that transformers itself makes.

The request holds `merged` (a folder of 16-bit weights), `target` (an empty one), `scheme`, `group_size` (of gptq and
awq), `rows` (token ids to calibrate on) and `trust_remote_code`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

KEPT = ["lm_head"]  # in 16 bits: a few percent of the weights, and every token goes through them


def main() -> None:
    request = json.load(sys.stdin)
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": request["trust_remote_code"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(request["merged"], dtype="auto", **options)
    tokenizer = AutoTokenizer.from_pretrained(request["merged"], **options)
    rows = request["rows"]
    calibrate: dict[str, Any] = {}
    if rows:  # FP8 scales activations as they come
        ids = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        calibrate = {
            "dataset": Dataset.from_list(ids),
            "num_calibration_samples": len(rows),
            "max_seq_length": max(map(len, rows)),
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=modifier(request), **calibrate)
    model.save_pretrained(request["target"], save_compressed=True)


def modifier(request: dict[str, Any]) -> Any:
    """What llm-compressor calls the scheme."""
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme, linear = request["scheme"], {"targets": ["Linear"], "ignore": KEPT}
    if scheme == "fp8":
        return QuantizationModifier(scheme="FP8_DYNAMIC", **linear)
    if scheme == "w8a8":
        return GPTQModifier(scheme="W8A8", **linear)
    four_bits = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": request["group_size"]}
    groups = {"w4a16": {"targets": ["Linear"], "weights": four_bits | {"symmetric": scheme == "gptq"}}}
    return (GPTQModifier if scheme == "gptq" else AWQModifier)(config_groups=groups, ignore=KEPT)


if __name__ == "__main__":
    main()
