"""What the GPU's allocator holds, step by step, and the settings it really took; silent on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.hardware import GIB
from toolkit.memory import terms
from toolkit.recipe.schema import Architecture


def now_gib() -> dict[str, float | None]:
    """GiB allocated, reserved and free on the card at this moment; None each on a CPU."""
    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None, "free_gib": None}
    return {
        "allocated_gib": torch.cuda.memory_allocated() / GIB,
        "reserved_gib": torch.cuda.memory_reserved() / GIB,
        "free_gib": torch.cuda.mem_get_info()[0] / GIB,
    }


def tokens_that_fit(architecture: Architecture) -> float:
    """Tokens of all rows of a batch, prompts and answers, for which the card has memory now; no limit on a CPU."""
    if not torch.cuda.is_available():
        return math.inf
    free, _ = torch.cuda.mem_get_info()
    return max(0.0, free - terms.RESERVE_GIB * GIB) // terms.generation_bytes(architecture)


def allocator_settings() -> dict[str, Any] | None:
    """What the CUDA allocator made of its variable; None on a CPU or where torch does not tell.

    A setting that the allocator does not know is dropped or fails late, so what was asked for proves nothing.
    """
    if not torch.cuda.is_available():
        return None
    try:
        return dict(torch.cuda.memory._snapshot()["allocator_settings"])
    except Exception:  # a private function: whatever it raises after an upgrade must not end a run
        return None


class Timeline(TrainerCallback):
    """Adds `vram_gib`, `vram_reserved_gib` and `vram_peak_gib` (since the last log) to each log entry.

    `peak_gib` is the highest peak since training began; None on a CPU.
    """

    def __init__(self) -> None:
        self._peak = 0.0

    @property
    def peak_gib(self) -> float | None:
        if not torch.cuda.is_available():
            return None
        return max(self._peak, torch.cuda.max_memory_allocated() / GIB)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            return
        peak = torch.cuda.max_memory_allocated() / GIB
        self._peak = max(self._peak, peak)
        torch.cuda.reset_peak_memory_stats()
        now = now_gib()
        logs["vram_gib"], logs["vram_reserved_gib"] = now["allocated_gib"], now["reserved_gib"]
        logs["vram_peak_gib"] = peak
