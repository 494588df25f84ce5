"""Whether an effective batch can be dealt."""

import re

import pytest

from toolkit.recipe.load import load
from toolkit.training.processes import problems


@pytest.mark.parametrize(
    ("overrides", "stage", "size", "said"),
    [
        ((), "sft", 1, ""),
        ((), "sft", 4, ""),
        ((), "sft", 3, "sft.effective_batch_size is 16 .* 3 processes: .*=15 or 18"),
        ((), "sft", 32, "cannot be dealt to 32 processes.*=32, another run"),
        (("memory.per_device_train_batch_size=4",), "sft", 4, ""),
        (("memory.per_device_train_batch_size=8",), "sft", 4, "8 at once in each .*=32"),
        ((), "kto", 2, "kto runs in one process"),
        (("rl.effective_batch_size=8", "rl.num_generations=4"), "rl", 2, ""),
        (("rl.effective_batch_size=8", "rl.num_generations=8"), "rl", 2, "whole groups of 8 completions"),
    ],
)
def test_a_batch_is_dealt_whole_or_the_near_ones_are_named(
    overrides: tuple[str, ...], stage: str, size: int, said: str
) -> None:
    found = "\n".join(problems(load("tiny", overrides), stage, size))
    assert re.search(said, found) if said else found == "", found
