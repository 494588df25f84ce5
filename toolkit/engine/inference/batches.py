"""Passes without gradients over many rows: longest first, as many at once as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from toolkit.engine.base import oom


def longest_first(
    lengths: Sequence[int],
    batch: Callable[[list[int]], torch.Tensor],
    budget: int,
    cost_of_token: int,
    where: str,
    advance: Callable[[int], None] = lambda count: None,
    recovery: oom.Recovery | None = None,
) -> torch.Tensor:
    """What `batch` gives for the indices of rows, (rows, values), put back into the order of `lengths`.

    The rows of a batch, each as long as its longest, cost at most `budget`, a longer one goes alone. With `recovery` a
    batch that does not fit is halved, which is told under `where`; raises UserError when one row alone does not.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    done: list[torch.Tensor] = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        size = max(1, min(budget // (longest * cost_of_token), len(order) - start))

        def of_first(size: int, start: int = start) -> torch.Tensor:
            return batch(order[start : start + size]).cpu()

        if recovery is None:
            result = of_first(size)
        else:
            row = partial("a row of {} tokens".format, longest)
            result, fitting = recovery.halving(where, size, of_first, row)
            if fitting < size:
                budget = fitting * longest * cost_of_token
        done.append(result)
        start += len(result)
        advance(len(result))
    values = torch.cat(done) if done else torch.zeros(0, 1)
    return values[torch.tensor(order, dtype=torch.long).argsort()]
