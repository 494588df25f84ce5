"""An order of rows in which each batch holds rows of like length: less padding, decided by the seed alone. Pure."""

import random
from collections.abc import Sequence

BATCHES_SORTED_TOGETHER = (
    50  # a batch stays a sample of that many batches, not of one length of the whole set
)


def grouped_by_length(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """Row numbers, to be read in sequence: `batch_size` neighbours have like lengths, the batches a random order.

    The batch with the longest row comes first, where a lack of memory costs least; a last, smaller batch stays last.
    The Trainer's own sampler for this draws from the global RNG, so a resumed run would see another order.
    """
    rng = random.Random(seed)
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    batches = []
    for start in range(0, len(rows), batch_size * BATCHES_SORTED_TOGETHER):
        some = rows[start : start + batch_size * BATCHES_SORTED_TOGETHER]
        some.sort(key=lambda row: -lengths[row])
        batches += [some[at : at + batch_size] for at in range(0, len(some), batch_size)]
    rest = [batch for batch in batches if len(batch) < batch_size]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(whole)
    if whole:
        longest = max(range(len(whole)), key=lambda at: max(lengths[row] for row in whole[at]))
        whole[0], whole[longest] = whole[longest], whole[0]
    return [row for batch in (*whole, *rest) for row in batch]
