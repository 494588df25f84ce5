"""Answers of a model to prompts: batched, left-padded, greedy or sampled with a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed
from unsloth import FastLanguageModel

from toolkit.engine.model import Loaded
from toolkit.masking import generation_prompt
from toolkit.recipe import Compare
from toolkit.rows import Messages


@dataclass(frozen=True)
class Answer:
    """`num_tokens` counts the generated tokens up to the end token; `ended` says the end-of-turn token came."""

    text: str
    num_tokens: int
    ended: bool


def answer(
    loaded: Loaded,
    prompts: Sequence[Messages],
    how: Compare,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """One answer a prompt, in the order of the prompts. Batches hold prompts of similar length."""
    tokenizer = loaded.tokenizer
    texts = [generation_prompt(loaded.template, prompt) for prompt in prompts]
    encodings = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encodings[index]))
    answers: dict[int, Answer] = {}
    FastLanguageModel.for_inference(loaded.model)
    set_seed(seed)
    for start in range(0, len(order), how.batch_size):
        indices = order[start : start + how.batch_size]
        batch = tokenizer.pad(
            {"input_ids": [encodings[index] for index in indices]}, padding_side="left", return_tensors="pt"
        ).to(loaded.model.device)
        sampling = {"temperature": how.temperature, "top_p": how.top_p} if how.do_sample else {}
        with torch.inference_mode():
            output = loaded.model.generate(
                **batch,
                max_new_tokens=how.max_new_tokens,
                do_sample=how.do_sample,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=loaded.model.generation_config.eos_token_id,
                use_cache=True,
                **sampling,
            )
        for index, tokens in zip(indices, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[index] = _answer(loaded, tokens)
        advance(len(indices))
    return [answers[index] for index in range(len(prompts))]


def _answer(loaded: Loaded, tokens: list[int]) -> Answer:
    tokenizer: Any = loaded.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids(loaded.end_of_turn)
    ends = set(loaded.model.generation_config.eos_token_id)
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    ended = length < len(tokens) and tokens[length] == end_of_turn
    text = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Answer(text, length + (length < len(tokens)), ended)
