"""Whether the disk has room for what a run will write."""

from __future__ import annotations

from toolkit import hardware
from toolkit.memory import terms
from toolkit.run.rundir import RunDir


def problem(run: RunDir, lora_gib: float, num_checkpoints: int = 0) -> str | None:
    """That the disk cannot hold the adapter and so many checkpoints beside it; None when it can."""
    needed, free = terms.saved_gib(lora_gib, num_checkpoints), hardware.disk_free_gib(run.path)
    if free >= needed:
        return None
    what = f"the adapter and {num_checkpoints} checkpoints" if num_checkpoints else "the adapter's files"
    return (
        f"{what} take {needed:.2f} GiB and the disk of {run.path} has {free:.2f} GiB free: make room there, or "
        "take --runs DIR on another disk" + (", or a smaller save_total_limit" if num_checkpoints else "")
    )
