"""Answers of a model to prompts: in batches of like length, left-padded, greedy or sampled with a seed.

Sampling gives each prompt dice of its own, seeded by the recipe's seed and the prompt's tokens: an answer depends
neither on the batch it was in nor on the other prompts or their order, and every model gets the same dice. What
remains is rounding: padding shifts a sum by a bit of bf16, and bitsandbytes multiplies a single row by another
kernel than several, so that a near-tie can fall the other way. With `mix_lengths: false` nothing is padded and no
row goes alone; on a CPU an answer is then the same in every batch. On a GPU kernels also change with the number of
rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer
from unsloth import FastLanguageModel

from toolkit.data.masking import generation_prompt, special_tokens
from toolkit.data.reasons import Reason
from toolkit.data.template import TemplateRefused
from toolkit.data.turns import Messages, is_text
from toolkit.engine.base.model import LoadedModel
from toolkit.errors import UserError
from toolkit.recipe.schema import Compare

# Called after each step with a function that gives {index of the prompt: its answer so far}.
OnStep = Callable[[Callable[[], dict[int, str]]], None]


@dataclass(frozen=True)
class Answer:
    """`ids` are the generated tokens with the end token, if it came; `ended` says that it was the end of the turn.

    `seconds` is the time until its last token, in the batch it was in.
    """

    text: str
    ids: list[int]
    ended: bool
    seconds: float

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """What is kept of it for readers."""
        return {"text": self.text, "num_tokens": self.num_tokens, "ended": self.ended}


def encode(loaded: LoadedModel, prompts: Sequence[Messages], how: Compare) -> list[list[int]]:
    """Token ids of each prompt as training saw it, up to where the answer begins.

    Raises UserError, naming each, for prompts that the template refuses or that leave no room for an answer.
    """
    encodings, most = tokens(loaded, prompts), room(loaded, how)
    problems = [
        f"prompt {number} has {len(ids):,} tokens: {_limit(loaded, how)}"
        for number, ids in enumerate(encodings, 1)
        if len(ids) > most
    ]
    if problems:
        raise UserError(*problems)
    return encodings


def tokens(loaded: LoadedModel, prompts: Sequence[Messages]) -> list[list[int]]:
    """As `encode`, however long they are."""
    texts, problems = [], []
    special = special_tokens(loaded.tokenizer.backend_tokenizer, loaded.template, loaded.end_of_turn)
    for number, prompt in enumerate(prompts, 1):
        for turn in prompt:  # as of rows: see masking
            if found := special.search(turn["content"]):
                problems.append(
                    f"prompt {number}: its {turn['role']} turn holds {found[0]!r}, a special token of the tokenizer "
                    "or template, as text: leave it out, or break it with a space"
                )
            elif not is_text(turn["content"]):
                problems.append(f"prompt {number}: {Reason.BROKEN_TEXT.sentence}; write it again")
        if problems:
            continue
        try:
            texts.append(generation_prompt(loaded.template, prompt))
        except TemplateRefused as refused:
            problems.append(f"prompt {number}: the chat template refuses it ({refused})")
    if problems:
        raise UserError(*problems)
    return loaded.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def room(loaded: LoadedModel, how: Compare) -> int:
    """Tokens that a prompt may have: of what the model was loaded for, and with its answer of positions and card."""
    together = min(_positions(loaded), loaded.batch_tokens)
    return max(0, min(loaded.max_length, int(together) - how.max_new_tokens))


def _positions(loaded: LoadedModel) -> int:
    return int(loaded.model.config.max_position_embeddings)


def _limit(loaded: LoadedModel, how: Compare) -> str:
    """What a prompt has to keep to, and why."""
    most, positions = room(loaded, how), _positions(loaded)
    if most == loaded.max_length:
        return f"the model is loaded for inputs of at most {most:,}"
    within = (
        f"the model's {positions:,} positions"
        if positions <= loaded.batch_tokens
        else f"the {loaded.batch_tokens:,.0f} tokens that the card has memory for"
    )
    return f"at most {most:,} leave room for compare.max_new_tokens {how.max_new_tokens} within {within}"


def batches(lengths: Sequence[int], how: Compare, batch_tokens: float = math.inf) -> list[list[int]]:
    """Indices, batch by batch: of like length, and of one length only unless `mix_lengths`.

    No batch holds more than `batch_tokens`, each row padded to the longest and answered in full; a single row may.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if how.mix_lengths:
        groups = [order]
    else:
        groups = [list(group) for _, group in itertools.groupby(order, key=lengths.__getitem__)]
    found: list[list[int]] = []
    for group in groups:
        batch: list[int] = []
        for index in group:  # ascending: the one that is added is the longest
            tokens_then = (len(batch) + 1) * (lengths[index] + how.max_new_tokens)
            if batch and (len(batch) == how.batch_size or tokens_then > batch_tokens):
                found.append(batch)
                batch = []
            batch.append(index)
        found.append(batch)
    return [batch for batch in found if batch]


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Messages],
    how: Compare,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
    on_step: OnStep = lambda texts: None,
) -> list[Answer]:
    """One answer a prompt, in the order of the prompts. Raises UserError as `encode` does."""
    encodings = encode(loaded, prompts, how)
    FastLanguageModel.for_inference(loaded.model)
    answers: dict[int, Answer] = {}
    for indices in batches([len(ids) for ids in encodings], how, loaded.batch_tokens):
        heard = _answer_batch(loaded, [encodings[index] for index in indices], indices, how, seed, on_step)
        answers.update(zip(indices, heard, strict=True))
        advance(len(indices))
    return [answers[index] for index in range(len(prompts))]


def _answer_batch(
    loaded: LoadedModel,
    encodings: list[list[int]],
    indices: list[int],
    how: Compare,
    seed: int,
    on_step: OnStep,
) -> list[Answer]:
    tokenizer, model = loaded.tokenizer, loaded.model
    if len(encodings) == 1 and not how.mix_lengths:
        encodings = encodings * 2  # a single row would take another kernel; the second is not heard
    batch = tokenizer.pad({"input_ids": encodings}, padding_side="left", return_tensors="pt").to(model.device)
    ends: list[int] = model.generation_config.eos_token_id
    heard = _Heard(loaded, indices, set(ends), on_step)
    with torch.inference_mode():
        model.generate(
            **batch,
            max_new_tokens=how.max_new_tokens,
            do_sample=False,  # sampling is the last of the processors
            logits_processor=LogitsProcessorList(_sampling(how, seed, encodings, model.device)),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            use_cache=True,
            streamer=heard,
        )
    return heard.answers()


def _sampling(how: Compare, seed: int, encodings: list[list[int]], device: Any) -> list[LogitsProcessor]:
    if not how.do_sample:
        return []
    dice = [torch.Generator(device).manual_seed(_seed_of(seed, ids)) for ids in encodings]
    return [TemperatureLogitsWarper(how.temperature), TopPLogitsWarper(how.top_p), _Sampling(dice)]


def _seed_of(seed: int, ids: list[int]) -> int:
    digest = hashlib.blake2b(f"{seed}:{ids}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class _Sampling(LogitsProcessor):
    """Makes the largest score a draw from softmax(scores), each row with dice of its own.

    argmax(log p + G), G independent standard Gumbel, is distributed as p (Gumbel-max, Maddison et al. 2014, section
    2); -log(E) of a standard exponential E is such a G.
    """

    def __init__(self, dice: list[torch.Generator]):
        self._dice = dice

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, dice in zip(noise, self._dice, strict=True):
            row.exponential_(generator=dice)
        return scores - noise.log()


class _Heard(BaseStreamer):
    """Collects what `generate` says step by step: first the prompts, then one token a row."""

    def __init__(self, loaded: LoadedModel, indices: list[int], ends: set[int], on_step: OnStep):
        self._loaded, self._indices, self._ends, self._on_step = loaded, indices, ends, on_step
        self._ids: list[list[int]] = [[] for _ in indices]
        self._seconds = [0.0] * len(indices)
        self._begun = time.perf_counter()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        seconds = time.perf_counter() - self._begun
        for row, token in enumerate(value.tolist()[: len(self._ids)]):
            if not self._has_ended(row):
                self._ids[row].append(token)
                self._seconds[row] = seconds
        self._on_step(lambda: {index: self._text(row) for row, index in enumerate(self._indices)})

    def end(self) -> None:
        """Nothing is held back."""

    def answers(self) -> list[Answer]:
        end_of_turn = self._loaded.tokenizer.convert_tokens_to_ids(self._loaded.end_of_turn)
        return [
            Answer(self._text(row), ids, ids[-1:] == [end_of_turn], self._seconds[row])
            for row, ids in enumerate(self._ids)
        ]

    def _has_ended(self, row: int) -> bool:
        return bool(self._ids[row]) and self._ids[row][-1] in self._ends

    def _text(self, row: int) -> str:
        ids = self._ids[row][:-1] if self._has_ended(row) else self._ids[row]
        text: str = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()
