"""Log-probability of replies under a model, by a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console

from toolkit.data.masking import IGNORE_INDEX, TokenizedPair
from toolkit.engine.base import oom
from toolkit.engine.inference.batches import longest_first
from toolkit.engine.shared_prompt import check
from toolkit.engine.shared_prompt.hooks import TREE, NotShared, SharedPrompts, installed
from toolkit.engine.shared_prompt.tree import Lengths, tree_of

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
    """log pi(reply | prompt), summed over its tokens: (len(rows),) for chosen and for rejected, fp32 on the CPU.

    The prompt runs once for both where `share_prompts` let the model do so.
    """
    replied = [(row.prompt_ids, reply) for row in rows for reply in (row.chosen_ids, row.rejected_ids)]
    if installed(model) is None:
        values = replies(model, replied, pad_token_id, advance, recovery)
        return values[0::2], values[1::2]
    both = [_scored(*one) for one in replied]
    items, lengths = list(zip(both[0::2], both[1::2], strict=True)), _lengths(rows)

    def batch(indices: list[int]) -> torch.Tensor:
        some = [items[index] for index in indices]
        of_both = [side[0] for side in some] + [side[1] for side in some]
        shared = [lengths[index] for index in indices]
        return batch_sums(model, of_both, pad_token_id, shared).view(2, -1).T

    chosen, rejected = _in_batches(model, items, batch, advance, recovery).T
    return chosen, rejected


def share_prompts(model: Any, rows: Sequence[TokenizedPair], pad_token_id: int, console: Console) -> None:
    """Lets `pairs` of this model run each prompt once, where it can and some of the rows come out as they do padded."""
    if not rows or installed(model):
        return
    lengths = _lengths(rows)
    try:
        sharing = SharedPrompts(model, max(p + max(c, r) for p, c, r in lengths))
    except NotShared:
        return

    def values(some: list[TokenizedPair], is_shared: bool) -> torch.Tensor:
        if is_shared:
            return torch.cat(pairs(model, some, pad_token_id))
        chosen = [(row.prompt_ids, row.chosen_ids) for row in some]
        rejected = [(row.prompt_ids, row.rejected_ids) for row in some]
        return replies(model, chosen + rejected, pad_token_id)

    found = check.compare([rows[index] for index in check.choose(lengths)], values, model.dtype)
    if not found.holds:
        sharing.remove()
        console.print(
            f"[yellow]prompts of pairs are run twice: shared, log-probs differ by {found.worst:.3g} nats[/]"
        )


def replies(
    model: Any,
    replied: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
) -> torch.Tensor:
    """log pi(reply | prompt) of any number of (prompt_ids, reply_ids): (len(replied),), fp32 on the CPU."""
    return sums(model, [_scored(*one) for one in replied], pad_token_id, advance, recovery)


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

    def batch(indices: list[int]) -> torch.Tensor:
        return batch_sums(model, [sequences[index] for index in indices], pad_token_id)[:, None]

    return _in_batches(model, [(one,) for one in sequences], batch, advance, recovery)[:, 0]


def _lengths(rows: Sequence[TokenizedPair]) -> list[Lengths]:
    return [(len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)) for row in rows]


def _scored(prompt: list[int], reply: list[int]) -> Scored:
    return Scored(prompt + reply, [IGNORE_INDEX] * len(prompt) + reply)


def _in_batches(
    model: Any,
    items: Sequence[tuple[Scored, ...]],
    batch: Callable[[list[int]], torch.Tensor],
    advance: Callable[[int], None],
    recovery: oom.Recovery | None,
) -> torch.Tensor:
    """What `batch` gives for items of one or two sequences, a row an item, as many as the logits have room for."""
    width = len(items[0]) if items else 1
    return longest_first(
        [max(len(one.ids) for one in item) for item in items],
        batch,
        LOGIT_BYTES,
        width * model.get_output_embeddings().weight.shape[0] * 4,
        "log-probs",
        lambda count: advance(width * count),
        recovery,
    )


def batch_sums(
    model: Any, sequences: Sequence[Scored], pad_token_id: int, shared: Sequence[Lengths] | None = None
) -> torch.Tensor:
    """The same for one right-padded batch: (len(sequences),), fp32. `shared` are the lengths of pairs, whose chosen
    sequences come first, then the rejected ones: their prompts run once."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    attention, is_scored = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, labels) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        is_scored[row, : len(tokens)] = torch.tensor(labels) != IGNORE_INDEX
    ids, attention, is_scored = (tensor.to(model.device) for tensor in (ids, attention, is_scored))
    tree = {TREE: tree_of(shared, width)} if shared else {}
    with torch.no_grad():
        logits = (
            model(input_ids=ids, attention_mask=attention, use_cache=False, **tree).logits[:, :-1].float()
        )
    log_probs = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
    # not times 0: a NaN in the prompt is none in the reply
    sums: torch.Tensor = log_probs.where(is_scored[:, 1:], 0.0).sum(1)
    return sums
