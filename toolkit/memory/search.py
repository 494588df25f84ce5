"""Which settings fit into a budget: tokens per micro-batch first, then fewer recomputed layers."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from toolkit.memory.phases import Phases, Settings
from toolkit.recipe import stages
from toolkit.recipe.schema import Memory, Recipe

# Past about 2,048 tokens a larger micro-batch buys almost nothing (dequantisation is 6% of a step there: computed).
ENOUGH_TOKENS = 4096
# What auto takes for the loss: the first, and the smaller ones only where nothing else fits. Unsloth's default is 2.
LOSS_CHUNKS_GIB = (0.5, 0.25, 0.125)
LONGEST = 2**20  # tokens: where the search for the largest max_length ends

Batch = tuple[
    int, int | None
]  # rows that the Trainer hands over, tokens that run at once (None: all of them)


@dataclass(frozen=True)
class Search:
    """The settings that the recipe leaves open, in the order of preference, for rows of up to `max_length` tokens.

    A value that the recipe pins is the only one of its kind. `batches` are pairs of rows that the Trainer hands over
    and tokens that run at once; `layers` are numbers of layers that recompute, fewest first; `budget` is in bytes.
    """

    phases: Phases
    budget: float
    max_length: int
    effective_batch_size: int
    batches: list[Batch]
    layers: range
    chunks: tuple[float, ...]

    @classmethod
    def of(cls, recipe: Recipe, stage: str, phases: Phases, budget: float, max_length: int) -> Search:
        memory, effective = recipe.memory, recipe.section(stage).effective_batch_size
        num_layers = recipe.model.architecture.num_hidden_layers
        chunk, layers = memory.loss_chunk_gib, memory.recompute_layers
        if layers in ("all", "none"):
            layers = num_layers if layers == "all" else 0
        return cls(
            phases=phases,
            budget=budget,
            max_length=max_length,
            effective_batch_size=effective,
            batches=_batches(
                memory,
                effective,
                stages.of(stage).sequences_per_row * max_length,
                phases.packs,
                phases.rl is not None,
            ),
            layers=range(num_layers + 1) if isinstance(layers, str) else range(layers, layers + 1),
            chunks=LOSS_CHUNKS_GIB if chunk == "auto" else (chunk,),
        )

    def settings(self) -> Settings:
        """The best that fit, or the most frugal ones when none do."""
        frugal = [self._recomputing_most(batch, chunk) for batch in self.batches for chunk in self.chunks]
        first = next(filter(self._fits, frugal), None)
        return self._fewest_layers(first) if first else frugal[-1]

    def has_any(self) -> bool:
        """Whether any settings fit. A batch without accumulation has no copy of gradients, so the smallest one is not
        always the most frugal."""
        return any(self._fits(self._recomputing_most(batch, self.chunks[-1])) for batch in self.batches)

    def _recomputing_most(self, batch: Batch, chunk: float) -> Settings:
        rows, tokens = batch
        return Settings(rows, self.effective_batch_size // rows, self.layers[-1], chunk, tokens)

    def _fits(self, settings: Settings) -> bool:
        return self.phases.peak(settings, self.max_length) <= self.budget

    def _fewest_layers(self, settings: Settings) -> Settings:
        """Bisection: settings that fit still do with one more layer that recomputes."""
        place = bisect.bisect_left(
            self.layers, True, key=lambda layers: self._fits(replace(settings, recompute_layers=layers))
        )
        return replace(settings, recompute_layers=self.layers[place])


def _batches(memory: Memory, effective: int, width: int, packs: bool, writes: bool) -> list[Batch]:
    """By tokens where rows are padded, whole rows where they are packed or where the recipe pins their number; also
    where the model `writes` them, because TRL cuts a step of completions by rows."""
    rows, tokens = memory.per_device_train_batch_size, memory.tokens_per_micro_batch
    if isinstance(tokens, int) and not writes:
        return [(effective, tokens)]
    if rows != "auto":
        return [(rows, None)]
    if tokens is None or packs or writes:
        enough = tokens if isinstance(tokens, int) else ENOUGH_TOKENS
        most = min(effective, max(1, enough // width))
        return [(n, None) for n in range(most, 0, -1) if effective % n == 0]
    # Fewer tokens than the longest row has bring nothing: it runs alone.
    smaller = (ENOUGH_TOKENS // 2**halved for halved in range(1, ENOUGH_TOKENS.bit_length()))
    return [(effective, budget) for budget in (ENOUGH_TOKENS, *(n for n in smaller if n >= width))]


def largest_max_length(recipe: Recipe, stage: str, phases: Phases, budget: float) -> int:
    """Tokens per row that fit in the most frugal settings that the recipe leaves open; 0 if none."""

    def is_too_long(max_length: int) -> bool:
        return not Search.of(recipe, stage, phases, budget, max_length).has_any()

    # The range begins at 1, so the index of the first that is too long is the length before it.
    return bisect.bisect_left(range(1, LONGEST + 1), True, key=is_too_long)
