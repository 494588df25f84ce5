"""Whether the effective batch of a stage can be dealt to a number of processes."""

from __future__ import annotations

import math

from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe, Rl


def problems(recipe: Recipe, stage: str, size: int) -> list[str]:
    """What keeps `size` processes from training the stage together; empty when nothing does."""
    if size == 1:
        return []
    if not stages.of(stage).across_processes:
        return [
            f"{stage} runs in one process: its loss looks at all rows of a step together. Start run_{stage}.py "
            "without a launcher, on one GPU"
        ]
    section, rows = recipe.section(stage), recipe.memory.per_device_train_batch_size
    pinned = rows if isinstance(rows, int) else 1
    group = section.num_generations if isinstance(section, Rl) else 1
    unit = size * math.lcm(pinned, group)
    effective = section.effective_batch_size
    if effective % unit == 0:
        return []
    near = [value for value in (effective // unit * unit, (effective // unit + 1) * unit) if value]
    each = f", {pinned} at once in each (memory.per_device_train_batch_size)" if pinned > 1 else ""
    each += f", whole groups of {group} completions" if group > 1 else ""
    return [
        f"{stage}.effective_batch_size is {effective} and cannot be dealt to {size} processes{each}: take another "
        f"number of processes, or --set {stage}.effective_batch_size={' or '.join(map(str, near))}, another run"
    ]
