"""The layout of pairs whose prompt is there once: a flat stream of prompt, chosen, rejected, pair after pair.

The rejected reply sees its prompt and itself, never the chosen one, and its positions go on where the prompt ended. So
each token is what it would be in TRL's padded batch of prompt + chosen and prompt + rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

Lengths = tuple[int, int, int]  # tokens of prompt, chosen, rejected


@dataclass
class Uses:
    """How often a tree went through a model's decoder, and through the attention of one of its layers."""

    passes: int = 0
    attention_calls: int = 0


@dataclass(frozen=True, eq=False)
class Tree:
    """Where the T tokens of B pairs lie, beside a padded batch (2B, W): chosen rows first, then the rejected ones.

    Small integers, made on the CPU. `uses` is set by whoever sends it through a model.
    """

    lengths: tuple[Lengths, ...]
    from_padded: torch.Tensor  # (T,) where each token stands in the flattened padded batch
    to_padded: (
        torch.Tensor
    )  # (2B, W) which token stands at a padded place; pads get token 0, which nobody reads
    positions: torch.Tensor  # (T,)
    kv: torch.Tensor  # (K,) the tokens that are keys: of each pair prompt, chosen, prompt, rejected
    cu_q: (
        torch.Tensor
    )  # (2B + 1,) int32: where queries begin: prompt + chosen, rejected, prompt + chosen, ...
    cu_k: torch.Tensor  # (2B + 1,) int32: where keys begin: prompt + chosen, prompt + rejected, ...
    uses: Uses | None = None

    @property
    def T(self) -> int:
        """Tokens; Unsloth's own prefix tables have it under this name."""
        return len(self.positions)

    @cached_property
    def max_q(self) -> int:
        return max(max(prompt + chosen, rejected) for prompt, chosen, rejected in self.lengths)

    @cached_property
    def max_k(self) -> int:
        return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths)

    def to(self, device: Any, non_blocking: bool = False) -> Tree:
        """The same on a device; accelerate calls it for whatever a batch holds."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def may_see(self) -> torch.Tensor:
        """(T, T) bool: which token (row) sees which (column). The definition that every kernel is held to."""
        lengths = torch.tensor(self.lengths)
        part = torch.arange(3).repeat(len(lengths)).repeat_interleave(lengths.flatten())
        pair = torch.arange(len(lengths)).repeat_interleave(lengths.sum(1))
        across = (part[:, None] == 2) & (part[None, :] == 1)
        return (
            (pair[:, None] == pair[None, :]) & ~across & torch.ones(self.T, self.T, dtype=torch.bool).tril()
        )


def tree_of(lengths: Sequence[Lengths], width: int) -> Tree:
    """The tree of pairs of these lengths in a batch that is padded, to the right, to `width`."""
    of_pair = np.array(lengths)
    prompts, chosen, rejected = of_pair.T
    starts = of_pair.sum(1).cumsum() - of_pair.sum(1)
    from_padded, positions, kv = [], [], []
    to_padded = np.zeros((2 * len(lengths), width), np.int64)
    for pair, (start, (p, c, r)) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        first, second = pair * width, (len(lengths) + pair) * width
        from_padded += [np.arange(first, first + p + c), np.arange(second + p, second + p + r)]
        positions += [np.arange(p + c), np.arange(p, p + r)]
        kv += [np.arange(start, start + p + c), np.arange(start, start + p)]
        kv += [np.arange(start + p + c, start + p + c + r)]
        to_padded[pair, : p + c] = np.arange(start, start + p + c)
        to_padded[len(lengths) + pair, :p] = np.arange(start, start + p)
        to_padded[len(lengths) + pair, p : p + r] = np.arange(start + p + c, start + p + c + r)

    def begins(*sides: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], np.stack(sides, 1).flatten().cumsum()]).astype(np.int32))

    return Tree(
        lengths=tuple(lengths),
        from_padded=torch.from_numpy(np.concatenate(from_padded)),
        to_padded=torch.from_numpy(to_padded),
        positions=torch.from_numpy(np.concatenate(positions)),
        kv=torch.from_numpy(np.concatenate(kv)),
        cu_q=begins(prompts + chosen, rejected),
        cu_k=begins(prompts + chosen, prompts + rejected),
    )
