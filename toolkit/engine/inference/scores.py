"""Scores of conversations under a reward model, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from toolkit.engine.base import oom

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
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    values, start = torch.zeros(len(sequences)), 0
    pad = model.config.get_text_config().pad_token_id
    while start < len(order):
        longest = len(sequences[order[start]])
        size = 1 if pad is None else max(1, min(batch_tokens // longest, len(order) - start))

        def batch(size: int, start: int = start) -> torch.Tensor:
            return _batch(model, [sequences[index] for index in order[start : start + size]], pad).cpu()

        if recovery is None:
            result = batch(size)
        else:
            result, fitting = recovery.halving(
                "scores", size, batch, partial("a row of {} tokens".format, longest)
            )
            if fitting < size:
                batch_tokens = fitting * longest
        values[order[start : start + len(result)]] = result
        start += len(result)
        advance(len(result))
    return values


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
