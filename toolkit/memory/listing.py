"""A plan's items as a table shows them: rounded so that they add up to the peak, and what lies beside it apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

OUTSIDE = ("context", "reserve")  # items of a plan that its peak does not hold


class Listing(NamedTuple):
    """(name, GiB with two decimals) of what the peak holds, and of what is kept beside it."""

    inside: list[tuple[str, str]]
    outside: list[tuple[str, str]]


def listing(items_gib: Mapping[str, float]) -> Listing:
    """Each item is rounded up or down, the largest remainders up, so that those inside add up to their rounded sum.

    What then reads 0.00 is left out.
    """
    inside = {name: 100 * gib for name, gib in items_gib.items() if name not in OUTSIDE}
    shown = {name: int(hundredths) for name, hundredths in inside.items()}
    total = f"{sum(inside.values()) / 100:.2f}"  # as the peak is written
    missing = round(100 * float(total)) - sum(shown.values())
    for name in sorted(inside, key=lambda name: inside[name] - shown[name], reverse=True)[:missing]:
        shown[name] += 1
    outside = {name: round(100 * items_gib.get(name, 0.0)) for name in OUTSIDE}
    return Listing(
        *([(name, f"{n / 100:.2f}") for name, n in some.items() if n] for some in (shown, outside))
    )
