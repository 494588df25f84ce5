"""Rows for the runs: words of the tiny tokenizer, as many as rows of real sets have tokens.

SFT: log-normal about the recipe's own estimate of FineTome's mean, 540 tokens; none of its rows is at hand. Pairs: the
deciles of prompt and answers in LLaMA-Factory's dpo_en_demo.json (299 pairs, counted with Llama 3's tokenizer).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from toolkit.data.masking import generation_prompt
from toolkit.data.template import ChatTemplate, read_template
from toolkit.data.turns import Messages
from toolkit.recipe.schema import Recipe

SFT_MEAN, SFT_SIGMA = 540, 0.8
SFT_PROMPT_SHARE = 0.2
PROMPT = (11, 26, 45, 76, 108, 173, 385, 536, 752, 1089, 1273)
CHOSEN = (2, 22, 74, 162, 237, 302, 354, 407, 466, 523, 1022)
REJECTED = (2, 52, 109, 194, 256, 322, 373, 433, 477, 574, 888)
TEMPLATE_TOKENS = 60  # that the template may add to a row
SEED = 3407


def write(recipe: Recipe, folder: Path, num_chats: int, num_pairs: int) -> None:
    """sft.jsonl and dpo.jsonl as the toolkit reads them; with `stock_` before the name the same rows as plain texts."""
    words = _words(Path(recipe.locate(recipe.model.path)) / "tokenizer.json")
    dice = random.Random(SEED)
    template = ChatTemplate(
        read_template(recipe.locate(recipe.template.file)), "", recipe.template.end_of_turn
    )

    def text(tokens: float) -> str:
        return " ".join(dice.choices(words, k=max(2, round(tokens))))

    chats, pairs, stock_chats, stock_pairs = [], [], [], []
    for _ in range(num_chats):
        most = recipe.section("sft").max_length - TEMPLATE_TOKENS
        tokens = min(dice.lognormvariate(math.log(SFT_MEAN) - SFT_SIGMA**2 / 2, SFT_SIGMA), most)
        tokens = min(tokens, most)
        user, reply = text(SFT_PROMPT_SHARE * tokens), text((1 - SFT_PROMPT_SHARE) * tokens)
        chat: Messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        chats.append({"messages": chat})
        stock_chats.append({"text": template.render(chat)})
    for _ in range(num_pairs):
        most = recipe.section("dpo").max_length - TEMPLATE_TOKENS
        lengths = pair_lengths(dice)
        share = min(1.0, most / (lengths[0] + max(lengths[1:])))
        prompt, chosen, rejected = (text(share * tokens) for tokens in lengths)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        begin = generation_prompt(template, [{"role": "user", "content": prompt}])
        end = recipe.template.end_of_turn
        stock_pairs.append({"prompt": begin, "chosen": chosen + end, "rejected": rejected + end})
    for name, rows in (
        ("sft", chats), ("dpo", pairs), ("stock_sft", stock_chats), ("stock_dpo", stock_pairs)
    ):  # fmt: skip
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair_lengths(dice: random.Random) -> list[float]:
    """Tokens of a prompt, a chosen and a rejected reply."""
    return [_drawn(dice, deciles) for deciles in (PROMPT, CHOSEN, REJECTED)]


def _words(tokenizer: Path) -> list[str]:
    """Those that are one token with the blank before them."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha())


def _drawn(dice: random.Random, deciles: tuple[int, ...]) -> float:
    """A number whose deciles are these."""
    place = dice.uniform(0, len(deciles) - 1)
    below = min(int(place), len(deciles) - 2)
    return deciles[below] + (place - below) * (deciles[below + 1] - deciles[below])
