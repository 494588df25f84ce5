"""One thing that was looked at: what was found, whether that will do, and the fix where it will not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from toolkit.redaction import blanked

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """`fail`: the recipe cannot run here (without a recipe: none can); `warn`: it can, but look at it first."""

    name: str
    status: Status
    found: str
    fix: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """For JSON; the keys are the fields. Like all that is shown, without secrets."""
        return {key: blanked(value) for key, value in asdict(self).items()}


def ok(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def warn(name: str, found: str, fix: str) -> Check:
    return Check(name, "warn", found, fix)


def judged(name: str, found: str, problem: str | None) -> Check:
    """Failed where there is a problem; a problem names its fix."""
    return Check(name, "fail" if problem else "ok", found, problem)
