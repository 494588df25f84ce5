"""What a script hands to the engine: one stage of a recipe, planned, and where it writes and speaks."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from toolkit.memory.plan import Plan
from toolkit.recipe.schema import Dpo, Recipe, Sft, StageName
from toolkit.run.rundir import RunDir


@dataclass(frozen=True)
class Job:
    """One stage to run. `fresh` moves an earlier run aside instead of continuing it."""

    recipe: Recipe
    plan: Plan
    run: RunDir
    console: Console
    fresh: bool = False

    @property
    def stage(self) -> StageName:
        return self.plan.stage

    @property
    def section(self) -> Sft | Dpo:
        """The recipe's section of the stage."""
        return self.recipe.stage(self.stage)
