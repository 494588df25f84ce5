"""What a stage continues: the adapter of the stage before it, or the one that `--from` names. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import command
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import BASE
from toolkit.records.marks import AdapterMark, Made
from toolkit.redaction import marked
from toolkit.run import adapters, changes, sealing
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.run.sealing import MARK, SEAL

FROM = "from"  # the key under which a trajectory has what --from named


@dataclass(frozen=True)
class Start:
    """An adapter that `run` continues. `name` is a variant of the recipe's stages, or a path.

    `is_named`: --from named it, so it may have been trained otherwise than the recipe says now.
    """

    run: RunDir
    name: str
    folder: Path
    is_named: bool

    def is_there(self) -> bool:
        return self.is_named or self.run.of(self.name).finished_with() is not None

    def made(self) -> Made | None:
        """What the adapter says of how it was made; None for one that bears no seal of ours."""
        return AdapterMark.load(self.folder / MARK) or Made.load(self.folder / SEAL)

    def trajectory(self, recipe: Recipe) -> dict[str, Any]:
        """`Recipe.trajectory` of the run; the values of the stages before it are those that the adapter was made by."""
        values = recipe.trajectory(self.run.stage)
        if not self.is_named:  # `check` holds the two to be the same
            return values
        own = {path: value for path, value in values.items() if not self._is_before(path)}
        made = self.made()
        theirs = ((made and made.trajectory) or {}).items()
        return own | {path: value for path, value in theirs if self._is_before(path)} | {FROM: self.name}

    def check(self, recipe: Recipe) -> list[str]:
        """Raises UserError unless the run may continue the adapter; returns what should be known of it."""
        if not self.is_named:
            return self._check_stage(recipe)
        adapters.check_fits(recipe, self.folder)
        self._check_lora(recipe)
        notes = []
        if not any((self.folder / name).is_file() for name in (MARK, SEAL)):
            notes.append(
                f"{self.folder} bears no seal: nothing says whether its files are as they were saved"
            )
        sealing.check(self.folder)
        dtypes = sorted({tensor.dtype for tensor in adapters.tensors(self.folder / WEIGHTS).values()})
        if dtypes != ["F32"]:
            notes.append(f"the weights in {self.folder} are {', '.join(dtypes)}; they are trained on in fp32")
        return notes

    def _check_stage(self, recipe: Recipe) -> list[str]:
        before, this, other = self.run.of(self.name), self.run.stage.upper(), self.name.upper()
        mark = before.finished_with()
        if mark is None:
            raise UserError(
                f"{this} continues the {other} adapter and there is none in {before.adapter}: run "
                f"`{command.propose(self.name, recipe.name)}` first, or `--set {self.name}=null` for {this} on the "
                "model itself"
            )
        before.check_adapter()
        now, decides = marked(recipe.trajectory(self.name)), recipe.what_decides()
        known = mark.trajectory or now  # of another version it may lack a key
        shared = (path for path in now if path in known and decides.get(path) != "held_out")
        fields = [path for path in shared if self._is_before(path) or decides.get(path) == "model"]
        if changed := changes.between(known, now, fields):
            raise UserError(
                f"{this} continues {before.adapter}, which was trained otherwise than the recipe says now: give the "
                f"same --set as then, or train it beside that one with `{command.propose(self.name, recipe.name)} "
                f"--name NAME` and continue it with `--from {self.name}-NAME`. Changed: {'; '.join(changed.values())}"
            )
        self._check_lora(recipe)
        return []

    def _check_lora(self, recipe: Recipe) -> None:
        if other := adapters.other_lora(recipe, self.folder):
            raise UserError(
                f"{self.folder} does not fit the recipe's lora section, so it would be another model from the first "
                f"step: {'; '.join(other)}; take the adapter's own values with --set"
            )

    def _is_before(self, path: str) -> bool:
        """Whether a value of a recipe is of a stage before the run's own."""
        before = [stage.name for stage in stages.lineage(self.run.stage) if stage.name != self.run.stage]
        return path.split(".")[0] in before


def of(recipe: Recipe, run: RunDir, named: str | None = None) -> Start | None:
    """What the run starts from: what --from names, else the stage before it; None for the model itself.

    Raises UserError for a name under which there is nothing.
    """
    if named is None:
        before = recipe.starts_from(run.stage)
        return Start(run, before, run.of(before).adapter, is_named=False) if before else None
    try:
        folder = adapters.find(recipe, run, named)
    except UserError as error:
        raise UserError(*(f"--from {named}: {problem}" for problem in error.problems)) from None
    if folder is None:
        return None
    if folder == run.adapter:
        raise UserError(f"--from {named}: a run cannot continue itself; give it a --name of its own")
    return Start(run, named if stages.is_variant(named) else str(folder.absolute()), folder, is_named=True)


def origin(recipe: Recipe, run: RunDir) -> str:
    """What a run started from: a variant, the path of an adapter, or base; where nothing says it, as in the recipe."""
    return run.started_from() or recipe.starts_from(run.stage) or BASE


def lineage(recipe: Recipe, run: RunDir) -> list[str]:
    """The variants that a run's adapter went through, the run itself last."""
    names = [run.name]
    while stages.is_variant(before := origin(recipe, run.of(names[0]))) and before not in names:
        names.insert(0, before)
    return names


def on_the_model_itself(recipe: Recipe, stage: str) -> Recipe:
    """The recipe without the stages before this one, as `--from base` asks for."""
    before = [one.name for one in stages.lineage(stage) if one.name != stage]
    return recipe.model_copy(update=dict.fromkeys(before))
