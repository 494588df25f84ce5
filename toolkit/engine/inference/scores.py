"""Scores of conversations under a reward model, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.engine.base import oom
from toolkit.engine.inference.batches import longest_first

BATCH_TOKENS = 8192  # of a batch, padding counted; forward only, an 8B model holds 0.9 GiB for them


def of_tokens(
    model: Any,
    sequences: Sequence[list[int]],
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> torch.Tensor:
    """One score for each sequence: (len(sequences),), fp32 on the CPU.

    The longest come first. With `recovery` a batch that does not fit is halved; raises UserError when one sequence
    alone does not. A model without a pad token takes one at a time.
    """
    pad = model.config.get_text_config().pad_token_id

    def batch(indices: list[int]) -> torch.Tensor:
        return _batch(model, [sequences[index] for index in indices], pad)[:, None]

    budget = 0 if pad is None else batch_tokens
    lengths = [len(sequence) for sequence in sequences]
    return longest_first(lengths, batch, budget, 1, "scores", advance, recovery)[:, 0]


def _batch(model: Any, sequences: Sequence[list[int]], pad: int | None) -> torch.Tensor:
    """Of one right-padded batch: (len(sequences),), fp32."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), 0 if pad is None else pad)
    attention = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
    ids, attention = ids.to(model.device), attention.to(model.device)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16),
        ):
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    finally:
        model.train(was_training)
    scores: torch.Tensor = logits[:, 0].float()
    return scores
