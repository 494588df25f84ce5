"""Loads an export as its reader would, and answers. A program of its own: `python -P consumer.py <REQUEST >ANSWER`.

It is run by path in a fresh process and imports nothing of this toolkit, because Unsloth rewrites transformers in the
process that it is imported into: what loads there need not load elsewhere.

The request holds `loads` (what to load, one after the other), `chats` (conversations to be rendered), `sequences`
({prompt_ids, answer_ids, top_ids}) and `max_new_tokens`. The answer holds for each load its `rendered` token ids, its
end tokens `ends`, and for each sequence `log_probs` of the `top_ids`, `greedy` tokens and what it `generated` itself.
Of a reward model the request holds `scored` conversations, the answer their `rendered` ids and `scores`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    request = json.load(sys.stdin)
    with answers:
        json.dump([answer(load, request) for load in request["loads"]], answers)


def answer(load: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if "scored" in request:
        return _scores(load, request)
    return (_llama_cpp if load["kind"] == "gguf" else _transformers)(load, request)


def _transformers(load: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(load["path"])
    model = _model(load).eval()
    ends = model.generation_config.eos_token_id
    sequences = []
    for sequence in request["sequences"]:
        prompt, reply = sequence["prompt_ids"], sequence["answer_ids"]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=request["max_new_tokens"],
                do_sample=False,
            )
        generated = output[0, len(prompt) :].tolist()
        sequences.append(read(model, prompt, reply, sequence["top_ids"]) | {"generated": generated})
    rendered = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in request["chats"]
    ]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "rendered": rendered,
        "ends": sorted(ends) if isinstance(ends, list) else [ends],
        "sequences": sequences,
    }


def _scores(load: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(load["path"]), _model(load, scores=True).eval()
    model.config.pad_token_id = tokenizer.pad_token_id  # PEFT takes the base's
    rendered = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in request["scored"]]
    scores = []
    for ids in rendered:
        with torch.inference_mode():
            scores.append(model(input_ids=torch.tensor([ids], device=model.device)).logits.float().item())
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {"rendered": rendered, "scores": scores}


def read(model: Any, prompt: list[int], reply: list[int], top_ids: list[list[int]] | int) -> dict[str, Any]:
    """One forward pass over prompt + reply, at the positions that predict the reply: `greedy` tokens, and
    `log_probs` of `top_ids` (given for each position, or a number: the most probable ones)."""
    import torch

    ids = torch.tensor([prompt + reply], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    log_probs = logits.log_softmax(-1)
    if isinstance(top_ids, int):
        chosen = log_probs.topk(top_ids).indices
    else:
        chosen = torch.tensor(top_ids, device=log_probs.device)
    return {
        "top_ids": chosen.tolist(),
        "log_probs": log_probs.gather(1, chosen).tolist(),
        "greedy": log_probs.argmax(-1).tolist(),
    }


def _model(load: dict[str, Any], scores: bool = False) -> Any:
    import peft
    import torch
    import transformers
    from transformers import BitsAndBytesConfig, GenerationConfig

    task = "SequenceClassification" if scores else "CausalLM"
    auto, auto_peft = getattr(transformers, f"AutoModelFor{task}"), getattr(peft, f"AutoPeftModelFor{task}")
    options: dict[str, Any] = {
        "trust_remote_code": load["trust_remote_code"],
        "dtype": getattr(torch, load["dtype"]),
    }
    if scores and load["kind"] != "merged":
        options["num_labels"] = 1  # the base says nothing of it
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    if load["quantise"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
            llm_int8_skip_modules=["lm_head", "score"],
        )
    if load["kind"] == "adapter":
        model = auto_peft.from_pretrained(load["path"], **options)
        if scores:
            return model
        model.generation_config = GenerationConfig.from_pretrained(load["path"])  # PEFT keeps the base's
        return model
    if load["kind"] == "merged":
        return auto.from_pretrained(load["path"], **options)
    base = auto.from_pretrained(load["base"], revision=load["revision"], **options)
    return peft.PeftModel.from_pretrained(base, load["path"])  # "unmerged": what a merge should equal


def _llama_cpp(load: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy as np
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    longest = max(len(one["prompt_ids"]) + len(one["answer_ids"]) for one in request["sequences"])
    llama = llama_cpp.Llama(
        model_path=load["path"],
        n_ctx=longest + request["max_new_tokens"] + 8,
        n_gpu_layers=-1,
        logits_all=True,
        verbose=False,
    )
    vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
    size = llama.n_vocab()
    sequences = []
    for sequence in request["sequences"]:
        prompt, reply = sequence["prompt_ids"], sequence["answer_ids"]
        llama.reset()
        llama.eval(prompt + reply)
        logits = np.array(llama.scores[len(prompt) - 1 : len(prompt) + len(reply) - 1], dtype=np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        generated: list[int] = []
        llama.reset()
        llama.eval(prompt)
        while len(generated) < request["max_new_tokens"]:
            generated.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            if llama_cpp.llama_vocab_is_eog(vocabulary, generated[-1]):
                break
            llama.eval(generated[-1:])
        sequences.append(
            {
                "log_probs": np.take_along_axis(log_probs, np.array(sequence["top_ids"]), 1).tolist(),
                "greedy": log_probs.argmax(1).tolist(),
                "generated": generated,
            }
        )
    render = Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"],
        bos_token=llama._model.token_get_text(llama.token_bos()) if llama.token_bos() >= 0 else "",
        eos_token=llama._model.token_get_text(llama.token_eos()),
        add_generation_prompt=True,
    )
    return {
        "rendered": [
            llama.tokenize(render(messages=chat).prompt.encode(), add_bos=False, special=True)
            for chat in request["chats"]
        ],
        "ends": [token for token in range(size) if llama_cpp.llama_vocab_is_eog(vocabulary, token)],
        "sequences": sequences,
    }


if __name__ == "__main__":
    main()
