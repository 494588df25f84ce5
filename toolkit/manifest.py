"""How a run was made: recipe, code, packages, machine, command line; what someone asks a week later."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolkit.env import Environment
from toolkit.hardware import Hardware, torch_build
from toolkit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
# A resumed run on another version of one of these may take other steps.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo")
# Hub tokens, API keys, and whatever stands behind a word that says it is one.
SECRET = re.compile(r"(hf_\w{8,}|sk-\w{8,}|(?i:token|secret|password|api_?key)[=: ]+)(\S*)")


def packages() -> dict[str, str | None]:
    """Installed version of each package that takes part in a step."""
    return {name: _version(name) for name in PACKAGES}


def describe(recipe: Recipe, machine: Hardware, environment: Environment) -> dict[str, Any]:
    """Everything but what the run itself measures. Secrets in the command line are blanked out."""
    gpu = machine.gpu
    return {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
        "seed": recipe.seed,
        "base_model": {"path": recipe.model.path, "revision": recipe.model.revision},
        "command": redacted(" ".join(sys.argv)),
        "code": _git(),
        "python": platform.python_version(),
        "packages": packages(),
        "torch_cuda": torch_build()[1],
        "gpu": {"name": gpu.name, "gib": gpu.total_gib, "driver": gpu.driver} if gpu else None,
        "ram_gib": machine.ram_gib,
        "cpu_count": machine.cpu_count,
        "allocator": environment.to_dict(),
    }


def now() -> str:
    """This moment in UTC, the same text on every host."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def redacted(text: str) -> str:
    """The text without tokens, keys and passwords, whether given in it or in the environment."""
    text = SECRET.sub(lambda match: "***" if match[1].startswith(("hf_", "sk-")) else f"{match[1]}***", text)
    for name, value in os.environ.items():
        if re.search(r"TOKEN|SECRET|PASSWORD|API_?KEY", name) and len(value) >= 6:
            text = text.replace(value, "***")
    return text


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
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
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
