"""Whether an export is the model that was trained: both read the same answers, and their log-probs are compared.

The trained model (the base as it was trained on, and its adapter, through Unsloth) answers the recipe's prompts
greedily. The export is loaded by its own consumer in a fresh process (consumer.py) and reads the same tokens. Compared
are the log-probs of the TOP most probable next tokens at each position of the answers, and the most probable one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from unsloth import FastLanguageModel

from toolkit.data.prompts import as_messages
from toolkit.data.turns import Messages
from toolkit.engine.base import model
from toolkit.engine.base.quiet import quiet
from toolkit.engine.export import consumer
from toolkit.engine.inference import generate
from toolkit.errors import UserError
from toolkit.export.artefact import Wanted
from toolkit.export.tool import tool
from toolkit.records.parity import Difference, Tolerance

TOP = 5
ANSWER_TOKENS = 128  # of an answer at most: enough positions, seconds rather than minutes on a GPU
# Further away than this share of what training changed, 16-bit files are not that model, however little it changed.
EFFECT_SHARE = 0.5


@dataclass(frozen=True)
class Answered:
    """The trained model's greedy answers: what consumers are asked, and what they are compared with.

    `effect` is the mean difference between the trained model and its base on the same tokens, `dtype` the one it
    computed in.
    """

    chats: list[Messages]
    rendered: list[list[int]]
    sequences: list[dict[str, Any]]
    ends: list[int]
    end_of_turn: int
    dtype: str
    effect: float
    max_new_tokens: int

    @property
    def request(self) -> dict[str, Any]:
        asked = [
            {key: sequence[key] for key in ("prompt_ids", "answer_ids", "top_ids")}
            for sequence in self.sequences
        ]
        return {"chats": self.chats, "sequences": asked, "max_new_tokens": self.max_new_tokens}


def answer(loaded: model.LoadedModel, wanted: Wanted) -> Answered:
    """Greedy answers of the trained model, loaded as `wanted.name`, to the recipe's prompts, with their log-probs.

    Raises UserError for prompts that leave no room for an answer.
    """
    recipe, tokenizer, trained = wanted.recipe, loaded.tokenizer, loaded.model
    chats = [as_messages(recipe, prompt) for prompt in recipe.compare.prompts]
    ends = trained.generation_config.eos_token_id
    max_new_tokens = min(recipe.compare.max_new_tokens, ANSWER_TOKENS)
    how = recipe.compare.model_copy(update={"max_new_tokens": max_new_tokens})
    FastLanguageModel.for_inference(trained)
    sequences, effects = [], []
    prompts = generate.encode(loaded, chats, how)
    for prompt in prompts:
        with model.use_adapter(trained, wanted.name):
            with torch.inference_mode():
                output = trained.generate(
                    input_ids=torch.tensor([prompt], device=trained.device),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=trained.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                )
            reply = output[0, len(prompt) :].tolist()
            read = consumer.read(trained, prompt, reply, TOP)
        with model.use_adapter(trained, "base"):
            before = consumer.read(trained, prompt, reply, read["top_ids"])
        effects.append(_diffs(read, before))
        sequences.append({"prompt_ids": prompt, "answer_ids": reply} | read)
    return Answered(
        chats=chats,
        rendered=prompts,
        sequences=sequences,
        ends=sorted(ends),
        end_of_turn=tokenizer.convert_tokens_to_ids(loaded.end_of_turn),
        dtype=str(trained.dtype).removeprefix("torch."),
        effect=torch.cat(effects).mean().item(),
        max_new_tokens=max_new_tokens,
    )


class Asked(Protocol):
    """What a consumer is asked: `Answered`, or the scores of a reward model."""

    @property
    def request(self) -> dict[str, Any]: ...


Ask = Callable[[Sequence[dict[str, Any]], Asked], list[dict[str, Any]]]


def in_fresh_process(loads: Sequence[dict[str, Any]], answered: Asked) -> list[dict[str, Any]]:
    """What the consumer answers, for each load. Raises UserError with its last words when it cannot load one."""
    request = json.dumps(answered.request | {"loads": list(loads)})
    done = tool([sys.executable, "-P", consumer.__file__], request)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-4:]) or f"exit code {done.returncode}"
        raise UserError(f"the export does not load where it is to be used ({loads[0]['kind']}): {said}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def in_this_process(loads: Sequence[dict[str, Any]], answered: Asked) -> list[dict[str, Any]]:
    """The same without a process of its own; for a consumer whose process does not matter."""
    with quiet():
        return [consumer.answer(load, answered.request) for load in loads]


def difference(one: dict[str, Any], other: list[dict[str, Any]]) -> Difference:
    """How far a consumer's answer is from the sequences of another model, over all positions of all answers."""
    pairs = list(zip(one["sequences"], other, strict=True))
    diffs = torch.cat([_diffs(mine, theirs) for mine, theirs in pairs])
    equal = [a == b for mine, theirs in pairs for a, b in zip(mine["greedy"], theirs["greedy"], strict=True)]
    gaps = [_gap(log_probs) for _, theirs in pairs for log_probs in theirs["log_probs"]]
    weighed = sum(gap for gap, is_equal in zip(gaps, equal, strict=True) if is_equal)
    return Difference(
        max_logprob_diff=diffs.max().item(),
        mean_logprob_diff=diffs.mean().item(),
        equal_greedy_fraction=sum(equal) / len(equal),
        weighed_equal_fraction=weighed / sum(gaps) if sum(gaps) else 1.0,
    )


def _gap(log_probs: list[float]) -> float:
    """Between the two best of a position, in nats."""
    best, second, *_ = sorted(log_probs, reverse=True)
    return best - second


def problems(
    measured: Difference, tolerance: Tolerance, against: str, effect: float | None = None
) -> list[str]:
    """What is beyond the tolerance, in words; NaN is beyond any. With `effect`, also what is nearly the base model."""
    found = []
    for key in ("max_logprob_diff", "mean_logprob_diff"):
        value, most = getattr(measured, key), getattr(tolerance, key)
        if not value <= most:
            found.append(f"{key} against {against} is {value:.4f}, at most {most:g} is expected")
    if not measured.weighed_equal_fraction >= tolerance.equal_greedy_fraction:
        found.append(
            f"{measured.weighed_equal_fraction:.1%} of the greedy tokens, weighed by how clear they are, equal those "
            f"of {against}, at least {tolerance.equal_greedy_fraction:.0%} are expected"
        )
    if effect is not None and not measured.mean_logprob_diff <= EFFECT_SHARE * effect:
        found.append(
            f"the mean difference from {against}, {measured.mean_logprob_diff:.4f}, is more than {EFFECT_SHARE:g} "
            f"of what training changed ({effect:.4f}): this is nearly the base model, or another one"
        )
    return found


def behaviour(got: dict[str, Any], answered: Answered, dated: bool) -> list[str]:
    """What differs in how the export renders prompts and ends answers. `dated`: the template writes today's date."""
    found = []
    wrong = [
        index
        for index, (mine, theirs) in enumerate(zip(got["rendered"], answered.rendered, strict=True))
        if mine != theirs
    ]
    if wrong and not dated:
        found.append(
            f"{len(wrong)} of {len(answered.rendered)} prompts become other tokens than in training (first: prompt "
            f"{wrong[0] + 1}): the chat template or the tokenizer is another one"
        )
    if answered.end_of_turn not in got["ends"]:
        found.append(
            f"the end-of-turn token {answered.end_of_turn} is not among its end tokens {got['ends']}: answers run on"
        )
    on = [
        index + 1
        for index, (mine, theirs) in enumerate(zip(got["sequences"], answered.sequences, strict=True))
        if theirs["answer_ids"][-1] in answered.ends and not set(mine["generated"]) & set(answered.ends)
    ]
    if len(on) > len(answered.sequences) / 4:  # one answer may run on where a token differs
        found.append(f"the trained model ends its answers and the export does not (prompts {on})")
    return found


def _diffs(one: dict[str, Any], other: dict[str, Any]) -> torch.Tensor:
    return (torch.tensor(one["log_probs"]) - torch.tensor(other["log_probs"])).abs().flatten()
