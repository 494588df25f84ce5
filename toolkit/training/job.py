"""What a script hands to the engine: one stage of a recipe, planned, and where it writes and speaks."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from toolkit.data import sets
from toolkit.memory.plan import Plan
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe, StageSection
from toolkit.recipe.stages import Stage
from toolkit.run.rundir import RunDir
from toolkit.training import trackers


@dataclass(frozen=True)
class Job:
    """One stage to run. `fresh` moves an earlier run aside instead of continuing it."""

    recipe: Recipe
    plan: Plan
    run: RunDir
    console: Console
    fresh: bool = False

    @property
    def stage(self) -> Stage:
        return stages.of(self.plan.stage)

    @property
    def starts_from(self) -> str | None:
        """The stage whose adapter this one continues; None when it starts from the model itself."""
        return self.recipe.starts_from(self.plan.stage)

    @property
    def section(self) -> StageSection:
        """The recipe's section of the stage."""
        return self.recipe.section(self.plan.stage)

    def is_finished(self) -> bool:
        """Whether there is nothing to run. Raises UserError when a run of other values stands there."""
        return not self.fresh and self.run.is_finished(self.recipe.trajectory(self.stage.name))

    def problems(self) -> list[str]:
        """What can be known to be wrong before torch is imported: with the plan, the sets, the trackers."""
        return [
            *filter(None, [self.plan.problem(self.recipe.name)]),
            *sets.problems(self.recipe, self.section, self.stage.row_kind),
            *trackers.problems(self.stage.name, self.section.report_to),
        ]
