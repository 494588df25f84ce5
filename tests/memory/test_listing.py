"""The table of a plan adds up as it is written."""

from hypothesis import given
from hypothesis import strategies as st

from toolkit.memory.listing import OUTSIDE, listing


@given(st.dictionaries(st.sampled_from([*"abcdefghij", *OUTSIDE]), st.floats(0, 50)))
def test_what_is_shown_adds_up_to_the_peak_as_it_is_shown(items: dict[str, float]) -> None:
    shown, outside = listing(items)
    peak = sum(gib for name, gib in items.items() if name not in OUTSIDE)
    assert f"{sum(round(100 * float(gib)) for _, gib in shown) / 100:.2f}" == f"{peak:.2f}"
    assert not {name for name, _ in shown} & set(OUTSIDE) and {name for name, _ in outside} <= set(OUTSIDE)
    assert "0.00" not in [gib for _, gib in (*shown, *outside)]
    assert all(abs(float(gib) - items[name]) < 0.01 for name, gib in shown)
