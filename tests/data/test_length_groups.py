"""Rows grouped by length: every row once, like beside like, the same for a seed."""

from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.length_groups import grouped_by_length

lengths_ = st.lists(st.integers(1, 500), max_size=300)


@given(lengths_, st.integers(1, 20), st.integers(0, 9))
def test_every_row_is_there_once_and_the_seed_decides(lengths: list[int], batch_size: int, seed: int) -> None:
    order = grouped_by_length(lengths, batch_size, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == grouped_by_length(lengths, batch_size, seed)


def test_it_pads_far_less_than_a_random_order_and_begins_with_the_longest() -> None:
    lengths = [1 + (7 * number) % 256 for number in range(1600)]

    def padded(order: list[int]) -> int:
        batches = [order[at : at + 16] for at in range(0, len(order), 16)]
        return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)

    order = grouped_by_length(lengths, 16, seed=1)
    assert padded(order) < 1.05 * sum(lengths)
    assert max(lengths[row] for row in order[:16]) == max(lengths)
    shorter_batches = [max(lengths[row] for row in order[at : at + 16]) for at in range(0, 160, 16)]
    assert shorter_batches != sorted(shorter_batches, reverse=True), "batches themselves are in random order"
