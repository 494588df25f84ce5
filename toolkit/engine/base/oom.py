"""Out-of-memory errors: noticed, cleared away, and told in one place; `pieces.py` runs the rows again."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape

from toolkit.engine.base import vram
from toolkit.errors import UserError
from toolkit.run.journal import Journal

Result = TypeVar("Result")

# Beside torch.OutOfMemoryError: the driver's own (expandable segments map memory through it), cuBLAS, the CPU's.
MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
    )


@dataclass(frozen=True)
class OutOfMemory:
    """What `attempt` returns instead of a result."""

    message: str


def attempt(work: Callable[[], Result]) -> Result | OutOfMemory:
    """The result of `work()`, or OutOfMemory once the exception and all that its frames held are gone."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = OutOfMemory(str(error).partition("\n")[0])
    free_memory()  # only here, where the traceback no longer holds the activations
    return failed


def free_memory() -> None:
    """Hands back what nothing refers to any more; on a GPU Unsloth's checkpoint buffers too."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(ImportError):
            from unsloth_zoo.gradient_checkpointing import reset_unsloth_gradient_checkpointing_buffers

            reset_unsloth_gradient_checkpointing_buffers()
        torch.cuda.empty_cache()


@dataclass
class Recovery:
    """What one stage knows of its memory: the factors that batches are split by, the most layers that had to recompute
    for a single row, and every event. `rank` is that of the process, where several train.

    `record` is the only way that an event is told: to the console, to the file and to the report.
    """

    file: Path
    console: Console
    split: dict[str, int] = field(default_factory=lambda: {"train": 1, "eval": 1})
    events: list[dict[str, Any]] = field(default_factory=list)
    most_recomputing: int = 0
    renamed: str | None = None
    rank: int | None = None

    def record(self, where: str, step: int, failed: OutOfMemory, action: str, split_factor: int) -> None:
        event = {
            "step": step,
            "where": self.renamed or where,
            "action": action,
            "split_factor": split_factor,
            **vram.now_gib(),
            "error": failed.message,
        }
        if self.rank is not None:
            event["rank"] = self.rank
        self.events.append(event)
        Journal(self.file, lambda said: self.console.print(escape(said))).write(event)
        self.console.print(f"[yellow]out of memory ({event['where']}, step {step}):[/] {escape(action)}")

    @contextlib.contextmanager
    def during(self, where: str) -> Iterator[None]:
        """Events of the block are told under this name."""
        self.renamed = where
        try:
            yield
        finally:
            self.renamed = None

    def halving(
        self, where: str, size: int, work: Callable[[int], Result], row: Callable[[], str]
    ) -> tuple[Result, int]:
        """(work(n), n) for the first n of size, size / 2, ... 1 that fits; `row` names the one that does not alone.

        Raises UserError then.
        """
        factor = 1
        while isinstance(result := attempt(partial(work, size)), OutOfMemory):
            if size == 1:
                self.record(where, 0, result, "nothing is left to give up: stopping", factor)
                raise UserError(f"out of memory ({where}) with {row()} alone: {fixes()}")
            size, factor = math.ceil(size / 2), 2 * factor
            self.record(where, 0, result, f"goes on with {size} at once", factor)
        return result, size


def fixes() -> str:
    return (
        "lower max_length or lora.r, take a smaller memory.loss_chunk_gib, close what else uses the memory, "
        "or take a larger card"
    )
