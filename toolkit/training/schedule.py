"""How many steps a stage takes, and whether its warm-up fits into them."""

from __future__ import annotations

import math

from toolkit.recipe.schema import Rl, StageSection


def num_steps(section: StageSection, num_rows: int | None) -> int | None:
    """Optimizer steps over so many rows; None where the epochs decide and the rows are not known."""
    if section.max_steps is not None or num_rows is None:
        return section.max_steps
    # Prompts that do not fill a last step are left out (TRL's RepeatSampler); other rows make a short one.
    whole = math.floor if isinstance(section, Rl) else math.ceil
    return math.ceil(section.num_train_epochs * whole(num_rows / section.rows_per_step))


def short_for_warmup(
    stage: str, section: StageSection, steps: int | None, at_most: bool = False
) -> str | None:
    """That the run ends within its warm-up, with the rate that it reaches; None where it gets beyond, or nobody knows.

    `at_most`: of the steps, where rows may still be dropped. A warm-up below 1 is a share of the run and always fits.
    """
    warmup = section.warmup_steps
    if steps is None or warmup < 1 or steps > warmup or section.lr_scheduler_type == "constant":
        return None
    reached = section.learning_rate * (steps - 1) / warmup  # the first step has a rate of 0
    return (
        f"the run has {'at most ' * at_most}{steps:,} steps and {stage}.warmup_steps is {warmup:g}: the learning rate "
        f"only reaches {reached:.2g} of {section.learning_rate:g}; train longer, or take "
        f"--set {stage}.warmup_steps=0.1, a tenth of the run"
    )
