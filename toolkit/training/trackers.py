"""Experiment trackers that a recipe's `report_to` asks for: whether they can be used, said before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from toolkit.errors import INSTALL_OPTIONAL


def problems(stage: str, report_to: Sequence[str]) -> list[str]:
    """What keeps the trackers from being used: a package that is not there, W&B without a key."""
    missing = [name for name in report_to if find_spec(name) is None]
    if missing:
        return [
            f"{stage}.report_to names {' and '.join(missing)}, which is not installed here: "
            f"{INSTALL_OPTIONAL}, or --set {stage}.report_to=[]"
        ]
    return _wandb_problems(stage) if "wandb" in report_to else []


def _wandb_problems(stage: str) -> list[str]:
    try:
        import wandb  # half a second: only where it is asked for

        settings = wandb.setup().settings
    except ValueError as error:  # of pydantic: WANDB_SILENT="", say
        said = " ".join(str(error).split()).partition(" For further")[0]
        return [
            f"{stage}.report_to names wandb, and its environment variables are not as it takes them: {said}"
        ]
    if settings.mode not in ("online", "run", None) or wandb.login(prompt=False):
        return []
    return [
        f"{stage}.report_to names wandb and there is no key for {settings.base_url}: run `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE=offline and `wandb sync` the run later"
    ]
