"""How a run was made: recipe, code, packages, machine, command line; what someone asks a week later."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit.env import Environment
from toolkit.hardware import Hardware, torch_build
from toolkit.recipe.schema import Recipe
from toolkit.records.record import plain
from toolkit.records.run_manifest import Attempt, Base, Code, Gpu, Manifest
from toolkit.redaction import redacted

ROOT = Path(__file__).resolve().parents[2]
# A resumed run on another version of one of these may take other steps.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo")


def packages() -> dict[str, str | None]:
    """Installed version of each package that takes part in a step."""
    return {name: _version(name) for name in PACKAGES}


def describe(recipe: Recipe, machine: Hardware, environment: Environment) -> dict[str, Any]:
    """Fields of the manifest, all but what the run itself measures. Secrets in the command line are blanked out."""
    gpu = machine.gpu
    return {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(recipe.model_dump_json(by_alias=True).encode()).hexdigest(),
        "seed": recipe.seed,
        "base_model": Base(recipe.model.path, recipe.model.revision),
        "command": redacted(shlex.join(sys.argv)),
        "code": _git(),
        "python": platform.python_version(),
        "packages": packages(),
        "torch_cuda": torch_build()[1],
        "gpu": Gpu(gpu.name, gpu.total_gib, gpu.driver) if gpu else None,
        "ram_gib": machine.ram_gib,
        "cpu_count": machine.cpu_count,
        "allocator": environment.to_dict(),
    }


def now() -> str:
    """This moment in UTC, the same text on every host. For people: nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def notes_on(before: Manifest, now: dict[str, Any]) -> list[str]:
    """What someone who continues a run should know of the attempt before, and of the machine it ran on."""
    notes = []
    if before.outcome == "running":
        reached = before.attempts[-1].step if before.attempts else 0
        notes.append(
            f"the attempt before ended without a word after its checkpoint of step {reached}: "
            "killed from outside (kill -9, power, or the kernel when the RAM ran out)"
        )
    for what, then in (("gpu", before.gpu), ("cpu_count", before.cpu_count)):
        here = now[what]
        if then != here and not (what == "cpu_count" and now["gpu"]):
            notes.append(
                f"{what}: {plain(then)} then, {plain(here)} now: goes on, but no longer bit for bit as it would have "
                "there"
            )
    return notes


def begun(recorded: Manifest, from_step: int) -> dict[str, Any]:
    """Facts of a new attempt at the run that `recorded` tells of; one that was killed could not say so itself."""
    attempts = [
        replace(attempt, outcome="killed") if attempt.outcome == "running" else attempt
        for attempt in recorded.attempts or []
    ]
    attempt = Attempt(
        command=redacted(shlex.join(sys.argv)),
        started=now(),
        ended=None,
        from_step=from_step,
        step=from_step,
        seconds=0.0,
        outcome="running",
        reason=None,
    )
    attempts.append(attempt)
    return {
        "outcome": "running",
        "reason": None,
        "started": attempts[0].started,
        "ended": None,
        "attempts": attempts,
    }


def noted(recorded: Manifest, **facts: Any) -> dict[str, Any]:
    """Facts of the attempt that runs, and the seconds of all of them, by a clock that no one sets back.

    Those of a killed attempt count up to its last checkpoint; loading Python's packages is not in them.
    """
    assert recorded.attempts, "an attempt has begun"
    attempts = [*recorded.attempts[:-1], replace(recorded.attempts[-1], **facts)]
    return {"attempts": attempts, "total_seconds": sum(attempt.seconds or 0.0 for attempt in attempts)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> Code | None:
    """Commit of the toolkit's own checkout and whether it was changed since; None outside one."""
    if not (ROOT / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Code(commit=commit.stdout.strip(), dirty=bool(status.stdout.strip()))
