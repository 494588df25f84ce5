"""Weights that follow from how many replies are good and bad: Ethayarajh et al. 2024, equation 8."""

from typing import Any

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load
from toolkit.recipe.schema import Kto
from toolkit.training.class_balance import ClassBalance


def section(good: Any, bad: Any) -> Kto:
    made = load("tiny", (f"kto.desirable_weight={good}", f"kto.undesirable_weight={bad}")).kto
    assert made
    return made


@pytest.mark.parametrize(
    ("good", "bad", "counts", "weights"),
    [
        ("auto", "auto", (100, 100), (1, 1)),
        ("auto", "auto", (100, 300), (3, 1)),
        ("auto", "auto", (300, 100), (1, 3)),
        ("auto", 2, (100, 300), (6, 2)),
        (2, "auto", (100, 300), (2, 2 / 3)),
        (1, 1, (100, 300), (1, 1)),
    ],
)
def test_the_classes_count_the_same_unless_both_weights_are_named(
    good: Any, bad: Any, counts: tuple[int, int], weights: tuple[float, float]
) -> None:
    found = ClassBalance.of(section(good, bad), *counts)
    assert (found.desirable_weight, found.undesirable_weight) == pytest.approx(weights)
    assert (found.warning() is None) == ("auto" in (good, bad) or counts[0] == counts[1])


def test_named_weights_out_of_range_are_told_with_the_ratio() -> None:
    assert ClassBalance.of(section(4, 3), 100, 100).warning() is None, "4 to 3 is still in it"
    assert "weigh 0.33 times the undesirable ones" in str(ClassBalance.of(section(1, 1), 100, 300).warning())


def test_a_class_without_rows_has_no_weight_but_one_that_is_named() -> None:
    with pytest.raises(UserError, match=r"all 8 rows are undesirable.*label column"):
        ClassBalance.of(section("auto", "auto"), 0, 8)
    assert ClassBalance.of(section(1, 1), 8, 0).warning() is None
