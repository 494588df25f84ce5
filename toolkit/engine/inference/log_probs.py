"""Log-probability of replies under a model, by a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from toolkit.data.masking import IGNORE_INDEX, TokenizedPair
from toolkit.engine.base import oom

LOGIT_BYTES = 2**28  # logits that exist at one time: fp32 of a batch stays within 256 MiB


class Scored(NamedTuple):
    """Tokens of a sequence; the log-probs of those whose label is not IGNORE_INDEX count."""

    ids: list[int]
    labels: list[int]


def pairs(
    model: Any,
    rows: Sequence[TokenizedPair],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(reply | prompt), summed over its tokens: (len(rows),) for chosen and for rejected, fp32 on the CPU."""
    replied = [(row.prompt_ids, reply) for row in rows for reply in (row.chosen_ids, row.rejected_ids)]
    values = replies(model, replied, pad_token_id, advance, recovery)
    return values[0::2], values[1::2]


def replies(
    model: Any,
    replied: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
) -> torch.Tensor:
    """log pi(reply | prompt) of any number of (prompt_ids, reply_ids): (len(replied),), fp32 on the CPU."""
    scored = [Scored(prompt + reply, [IGNORE_INDEX] * len(prompt) + reply) for prompt, reply in replied]
    return sums(model, scored, pad_token_id, advance, recovery)


def sums(
    model: Any,
    sequences: Sequence[Scored],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
) -> torch.Tensor:
    """Sums of log pi(token | tokens before) over the labelled tokens: (len(sequences),), fp32 on the CPU.

    The longest come first. With `recovery` a batch that does not fit is halved; raises UserError when one sequence
    alone does not.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].ids), reverse=True)
    values = torch.zeros(len(sequences))
    vocabulary = model.get_output_embeddings().weight.shape[0]
    start, budget = 0, LOGIT_BYTES
    while start < len(order):
        longest = len(sequences[order[start]].ids)
        size = max(1, min(budget // (longest * vocabulary * 4), len(order) - start))

        def batch(size: int, start: int = start) -> torch.Tensor:
            chosen = [sequences[index] for index in order[start : start + size]]
            return batch_sums(model, chosen, pad_token_id).cpu()

        if recovery is None:
            result = batch(size)
        else:
            result, fitting = recovery.halving(
                "log-probs", size, batch, partial("a row of {} tokens".format, longest)
            )
            if fitting < size:
                budget = fitting * longest * vocabulary * 4
        values[order[start : start + len(result)]] = result
        start += len(result)
        advance(len(result))
    return values


def batch_sums(model: Any, sequences: Sequence[Scored], pad_token_id: int) -> torch.Tensor:
    """The same for one right-padded batch: (len(sequences),), fp32."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    attention, is_scored = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, labels) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        is_scored[row, : len(tokens)] = torch.tensor(labels) != IGNORE_INDEX
    ids, attention, is_scored = (tensor.to(model.device) for tensor in (ids, attention, is_scored))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
    log_probs = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
    # not times 0: a NaN in the prompt is none in the reply
    sums: torch.Tensor = log_probs.where(is_scored[:, 1:], 0.0).sum(1)
    return sums
