"""What goes through the model at once: so many rows, or as many as stay within a number of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# {input_ids, labels} of a chat, {prompt_ids, chosen_ids, rejected_ids} of a pair, {prompt_ids, completion_ids} of a
# labelled reply, with the KL_completion_ids of its neighbour once they are paired
Row = dict[str, Any]


@dataclass(frozen=True)
class MicroBatches:
    """How a batch is cut. `tokens` bounds a piece, padding included (None: `rows`, or all that the Trainer hands over);
    `shares_prompts` says that the prompt of a pair is run once and nothing is padded."""

    tokens: int | None = None
    shares_prompts: bool = False
    rows: int | None = None

    def ordered(self, rows: Sequence[Row]) -> list[Row]:
        """The rows in the order in which they are cut: longest first where tokens decide, so that little is padding."""
        return sorted(rows, key=self._cost, reverse=True) if self.tokens else list(rows)

    def first(self, rows: Sequence[Row], num_rows: int, split: int = 1) -> int:
        """How many of the first of these ordered rows make the next piece of a batch of `num_rows`; at least one.

        `split` is the factor by which pieces shrank since memory ran out.
        """
        if self.tokens is None:
            return min(math.ceil(min(self.rows or num_rows, num_rows) / split), len(rows))
        tokens = self.tokens / split
        if self.shares_prompts:
            costs = itertools.accumulate(map(self._cost, rows))
            fitting = sum(1 for _ in itertools.takewhile(lambda cost: cost <= tokens, costs))
        else:
            fitting = int(tokens // self._cost(rows[0]))
        return max(1, min(fitting, len(rows)))

    def _cost(self, row: Row) -> int:
        if "chosen_ids" not in row:
            return row_tokens(row)
        return sum(pair_lengths(row)) if self.shares_prompts else 2 * row_tokens(row)


def pair_lengths(row: Row) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected."""
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def longest(rows: Any, count: int) -> list[Row]:
    """The `count` longest rows (pairs) together: no order of rows makes a larger micro-batch."""
    lengths = rows["length"][:] if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [rows[index] for index in order[:count]]


def row_tokens(row: Row) -> int:
    """Tokens of a row as it is trained; of a pair, or of a reply with its KL completion, those of its longer side."""
    if "input_ids" in row:
        return len(row["input_ids"])
    if "completion_ids" in row:
        replies = (row["completion_ids"], row.get("KL_completion_ids", ()))
        return len(row["prompt_ids"]) + max(map(len, replies))
    prompt, chosen, rejected = pair_lengths(row)
    return prompt + max(chosen, rejected)


def fed_tokens(row: Row) -> int:
    """Tokens of a row that are trained on or seen, padding left out; of a pair, both sequences."""
    if "input_ids" in row:
        return len(row["input_ids"])
    if "completion_ids" in row:
        return len(row["prompt_ids"]) + len(row["completion_ids"])
    prompt, chosen, rejected = pair_lengths(row)
    return 2 * prompt + chosen + rejected
