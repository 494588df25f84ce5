"""A run that ends within its warm-up says so before it starts."""

import pytest

from toolkit.recipe.load import load
from toolkit.training.schedule import num_steps, short_for_warmup


@pytest.mark.parametrize(
    ("overrides", "num_rows", "steps"),
    [((), 64, 6), (("sft.max_steps=7",), 64, 7), ((), None, None), (("sft.max_steps=7",), None, 7)],
)
def test_steps_follow_from_rows_epochs_and_batch(
    overrides: tuple[str, ...], num_rows: int | None, steps: int | None
) -> None:
    assert (
        num_steps(load("tiny", overrides).section("sft"), num_rows) == steps
    )  # 1.5 epochs of 16 rows a step


@pytest.mark.parametrize(
    ("overrides", "steps", "is_short"),
    [
        ((), 10, True),
        ((), 11, False),
        ((), None, False),
        (("sft.warmup_steps=0.1",), 3, False),
        (("sft.lr_scheduler_type=constant",), 3, False),
    ],
)
def test_a_run_within_its_warm_up_is_named_with_the_rate_it_reaches(
    overrides: tuple[str, ...], steps: int | None, is_short: bool
) -> None:
    said = short_for_warmup("sft", load("tiny", overrides).section("sft"), steps)
    assert bool(said) == is_short
    if said:
        assert "10 steps and sft.warmup_steps is 10" in said and "0.0018 of 0.002" in said
        assert "--set sft.warmup_steps=0.1" in said
