"""Log-probability of a reply under a model, by a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.masking import PairIds

LOGIT_BYTES = 2**28  # logits that exist at one time: fp32 of a batch stays within 256 MiB


def pairs(
    model: Any,
    rows: Sequence[PairIds],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(reply | prompt), summed over its tokens: (len(rows),) for chosen and for rejected, fp32 on the CPU."""
    sequences = [(row.prompt_ids, reply) for row in rows for reply in (row.chosen_ids, row.rejected_ids)]
    values = all_replies(model, sequences, pad_token_id, advance)
    return values[0::2], values[1::2]


def all_replies(
    model: Any,
    sequences: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """log pi(reply | prompt) of any number of (prompt_ids, reply_ids): (len(sequences),), fp32 on the CPU.

    In batches of similar length whose logits stay within LOGIT_BYTES.
    """
    order = sorted(
        range(len(sequences)), key=lambda index: len(sequences[index][0]) + len(sequences[index][1])
    )
    values = torch.zeros(len(sequences))
    vocabulary = model.get_output_embeddings().weight.shape[0]
    start = 0
    while start < len(order):
        size = 1
        while start + size < len(order):
            prompt, reply = sequences[order[start + size]]
            if (size + 1) * (len(prompt) + len(reply)) * vocabulary * 4 > LOGIT_BYTES:
                break
            size += 1
        indices = order[start : start + size]
        values[indices] = replies(model, [sequences[index] for index in indices], pad_token_id).cpu()
        start += size
        advance(size)
    return values


def replies(model: Any, sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> torch.Tensor:
    """log pi(reply | prompt) of (prompt_ids, reply_ids) in one right-padded batch: (len(sequences),), fp32."""
    width = max(len(prompt) + len(reply) for prompt, reply in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    attention, is_reply = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(sequences):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        attention[row, :end] = 1
        is_reply[row, len(prompt) : end] = True
    ids, attention, is_reply = (tensor.to(model.device) for tensor in (ids, attention, is_reply))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
    chosen = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
    return (chosen * is_reply[:, 1:]).sum(1)
