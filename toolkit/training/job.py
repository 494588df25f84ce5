"""What a script hands to the engine: one stage of a recipe, planned, and where it writes and speaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console

from toolkit.data import sets, template_check
from toolkit.errors import UserError
from toolkit.memory.plan import Plan
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe, StageSection
from toolkit.recipe.stages import Stage
from toolkit.run import room, start
from toolkit.run.rundir import RunDir
from toolkit.run.start import Start
from toolkit.training import reward_sources, schedule, trackers
from toolkit.world import ALONE, World


@dataclass(frozen=True)
class Job:
    """One stage to run. `fresh` moves an earlier run aside instead of continuing it; `from_` is what --from names.

    `base` loads the model, where runs share one (the engine's KeptBase). Of several processes that train it (`world`),
    the first one writes; `processes` are the others, once they are connected (the engine's Ranks). `reshard` goes on
    with another number of them than the run began with.
    """

    recipe: Recipe
    plan: Plan
    run: RunDir
    console: Console
    fresh: bool = False
    from_: str | None = None
    base: Any = None
    world: World = ALONE
    processes: Any = None
    reshard: bool = False

    @property
    def stage(self) -> Stage:
        return stages.of(self.plan.stage)

    @cached_property
    def start(self) -> Start | None:
        """The adapter that this one continues; None when it starts from the model itself."""
        return start.of(self.recipe, self.run, self.from_)

    def trajectory(self) -> dict[str, Any]:
        """The values that shape the weights, those of the stages before it as its starting adapter has them."""
        return self.start.trajectory(self.recipe) if self.start else self.recipe.trajectory(self.stage.name)

    @property
    def section(self) -> StageSection:
        """The recipe's section of the stage."""
        return self.recipe.section(self.plan.stage)

    @cached_property
    def _looked(self) -> sets.Looked:
        """Reads the local sets once."""
        return sets.look_at(self.recipe, self.section, self.stage.row_kind)

    def is_finished(self) -> bool:
        """Whether there is nothing to run. Raises UserError when a run of other values stands there.

        Where a set cannot be read it says that: what it was changed to matters less.
        """
        try:
            return not self.fresh and self.run.is_finished(self.trajectory())
        except UserError as error:
            raise UserError(*(self._looked.problems or error.problems)) from None

    def problems(self) -> list[str]:
        """What can be known to be wrong before torch is imported."""
        lora_gib, num_checkpoints = self.plan.items_gib["lora"], self.section.save_total_limit + 1
        found = [
            self.plan.problem(self.recipe.name),
            *self._looked.problems,
            *template_check.problems(self.recipe),
            *trackers.problems(self.stage.name, self.section.report_to),
            *reward_sources.problems(self.recipe, self.run, self.section),
            *self.run.problems(),
            self._rows_without_a_head(),
            room.problem(self.run, lora_gib, num_checkpoints),  # one more while it rotates
        ]
        return [problem for problem in found if problem]

    def _rows_without_a_head(self) -> str | None:
        if self.stage.answers or not self.recipe.lora.trainable_tokens:
            return None
        return (
            f"lora.trainable_tokens is set, and a {self.stage.label} has no head whose rows could be trained: --set "
            f"lora.trainable_tokens=[] with an SFT that was trained so, or with --set sft=null on the model itself"
        )

    def short_for_warmup(self) -> str | None:
        """That the run will end within its warm-up, as far as the rows are known before they are prepared."""
        steps = schedule.num_steps(self.section, self._looked.num_rows)
        return schedule.short_for_warmup(
            self.stage.name, self.section, steps, at_most=self.section.max_steps is None
        )

    def begins_at_step(self) -> int | None:
        """After which step the command would go on now; None where it would only say that the run is finished."""
        if self.is_finished():
            return None
        return 0 if self.fresh else self.run.sealed_step() or 0
