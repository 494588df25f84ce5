"""manifest.json: how a run was made and how its attempts ended. It grows while the run does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.records.record import Record


@dataclass(frozen=True)
class Base(Record):
    """`files` are the hashes of its files, by name, once it has been loaded."""

    path: str | None
    revision: str | None
    files: dict[str, str] | None = None


@dataclass(frozen=True)
class Code(Record):
    """Commit of the toolkit's own checkout, and whether it was changed since."""

    commit: str | None
    dirty: bool | None


@dataclass(frozen=True)
class Gpu(Record):
    name: str | None
    gib: float | None
    driver: str | None


@dataclass(frozen=True)
class Attempt(Record):
    """One process that worked at the run: from which step, to which, for how long, and how it ended."""

    command: str | None
    started: str | None
    ended: str | None
    from_step: int | None
    step: int | None
    seconds: float | None
    outcome: str | None
    reason: str | None


@dataclass(frozen=True)
class PlanMade(Record):
    """The memory plan that the run was started with, field by field that of `memory.plan.Plan`."""

    stage: str | None
    card: str | None
    items_gib: dict[str, float] | None
    phases_gib: dict[str, float] | None
    peak_gib: float | None
    budget_gib: float | None
    fits: bool | None
    settings: dict[str, Any] | None
    largest_max_length: int | None
    tokens_per_step: int | None
    flops_per_token: float | None
    floor_seconds_per_1000_steps: float | None
    floor_seconds: float | None
    tokens_of_run: int | None
    fixes: list[str] | None
    price_per_hour: float | None = None
    processes: int | None = None
    sharing: dict[str, Any] | None = None


@dataclass(frozen=True)
class Manifest(Record):
    """`trajectory` is what of the recipe shapes the weights, `conditions` what does beside it; a run is held to both.

    What has the default None comes while the run goes on.
    """

    trajectory: dict[str, Any] | None
    conditions: dict[str, Any] | None
    recipe: str | None
    recipe_sha256: str | None
    seed: int | None
    base_model: Base | None
    command: str | None
    code: Code | None
    python: str | None
    packages: dict[str, str | None] | None
    torch_cuda: str | None
    gpu: Gpu | None
    ram_gib: float | None
    cpu_count: int | None
    allocator: dict[str, Any] | None
    outcome: str | None
    reason: str | None
    started: str | None
    ended: str | None
    attempts: list[Attempt] | None
    resumed_from: str | None
    resumed_at_steps: list[int] | None
    plan: PlanMade | None
    rows: dict[str, str] | None = None
    num_steps: int | None = None
    train_tokens: int | None = None
    total_seconds: float | None = None
    wandb_run: str | None = None
