"""The recipe: one YAML says everything about a run, and is the only home of its values.

`load.py` reads it, `fields.py` says what a field declares. Field names are the upstream ones wherever upstream has one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from toolkit import command
from toolkit.errors import UserError
from toolkit.recipe import stages, yaml_file
from toolkit.recipe.fields import (
    TRAJECTORY,
    Role,
    Section,
    declared,
    key_of,
    on_machine,
    only_watches,
    shapes_rows,
    shapes_weights,
)
from toolkit.recipe.rl_section import Rl
from toolkit.recipe.sections import Architecture, Compare, Lora, Memory, Model, Template
from toolkit.recipe.stage_sections import AnswersSection, Dpo, Kto, Reward, Sft, Source, StageSection
from toolkit.recipe.stages import Stage

__all__ = [
    "AnswersSection",
    "Architecture",
    "Compare",
    "Dpo",
    "Kto",
    "Lora",
    "Memory",
    "Model",
    "Recipe",
    "Reward",
    "Rl",
    "Sft",
    "Source",
    "StageSection",
    "Template",
]


class Recipe(Section):
    """Everything that shapes a run."""

    description: Annotated[
        str, only_watches("one line for people, shown in comparisons and model cards", "true of every recipe")
    ] = "A language model, fine-tuned on one GPU"
    gpu: Annotated[
        str | None,
        on_machine("the card it is made for; refused where there is none", "runs without one"),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32),  # what numpy takes
        shapes_rows("of row order, LoRA, dropout and sampling", "Unsloth's notebooks", "split"),
    ] = 3407
    model: Model
    template: Template
    lora: Lora = Lora()
    memory: Memory = Memory()
    sft: Annotated[Sft | None, shapes_weights("supervised fine-tuning", "there is no such stage")] = None
    dpo: Annotated[Dpo | None, shapes_weights("preference optimisation", "there is no such stage")] = None
    reward: Annotated[Reward | None, shapes_weights("a reward model", "there is no such stage")] = None
    kto: Annotated[
        Kto | None, shapes_weights("preference optimisation from labels", "there is no such stage")
    ] = None
    rl: Annotated[Rl | None, shapes_weights("learning from rewards", "there is no such stage")] = None
    compare: Compare = Compare()

    _file: Path = PrivateAttr(default=Path("recipe.yaml"))

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        if not self.stages():
            raise ValueError(f"none of {', '.join(stages.names())} is set: a recipe needs at least one stage")
        micro, layers = self.memory.per_device_train_batch_size, self.memory.recompute_layers
        for stage in self.stages():
            effective = self.section(stage.name).effective_batch_size
            if micro != "auto" and effective % micro:
                raise ValueError(
                    f"{stage.name}.effective_batch_size {effective} is not a multiple of "
                    f"memory.per_device_train_batch_size {micro}: accumulation must be whole"
                )
        if micro != "auto" and isinstance(self.memory.tokens_per_micro_batch, int):
            raise ValueError(
                "memory.per_device_train_batch_size and memory.tokens_per_micro_batch are both set: a micro-batch is "
                "cut by rows or by tokens"
            )
        if isinstance(layers, int) and layers > self.model.architecture.num_hidden_layers:
            raise ValueError(f"memory.recompute_layers {layers} is more than the model's layers")
        return self

    @property
    def name(self) -> str:
        return self._file.stem

    def stages(self) -> list[Stage]:
        """The stages that the recipe has, in the order in which they run."""
        return [stage for stage in stages.STAGES.values() if getattr(self, stage.name, None) is not None]

    def section(self, stage: str) -> StageSection:
        """The section of a stage. Raises UserError when the recipe has none."""
        section: StageSection | None = getattr(self, stage)
        if section is None:
            others = " or ".join(f"`{command.propose(other.name, self.name)}`" for other in self.stages())
            raise UserError(
                f"recipe {self.name} has no {stage} stage (its {stage} is null); run {others} instead, or write a "
                f"{stage} section into {self._file}"
            )
        return section

    def starts_from(self, stage: str) -> str | None:
        """The stage whose adapter this one continues; None when it starts from the model itself."""
        return next((name for name in stages.of(stage).continues if getattr(self, name) is not None), None)

    def places(self) -> list[Path]:
        """Where a relative path of the recipe is looked for: beside its file, then in the working directory."""
        return list(dict.fromkeys((self._file.parent.absolute(), Path.cwd())))

    def looked_in(self, path: str) -> str:
        """What a message says behind a path that is not there; "" for an absolute one, which says it itself."""
        return (
            ""
            if os.path.isabs(os.path.expanduser(path))
            else f" (looked in {' and '.join(map(str, self.places()))})"
        )

    def locate(self, path: str) -> str:
        """A path of the recipe as this process can open it; globs are allowed. A Hub id is returned as it is."""
        path = os.path.expanduser(path)
        is_pattern = glob.has_magic(path)
        for folder in self.places():
            if os.path.exists(folder / path):  # also of a name that looks like a pattern
                return str(folder / path)
            pattern = os.path.join(glob.escape(str(folder)), path)
            if is_pattern and next(glob.iglob(pattern, recursive=True), None):
                return pattern
        return path

    def to_yaml(self) -> str:
        """The recipe with every value spelled out, loadable again; `# default` beside what was not written."""
        comments = dict.fromkeys(self.unwritten(), "default")
        return yaml_file.dump(self.model_dump(mode="json", by_alias=True), comments)

    def trajectory(self, stage: str) -> dict[str, Any]:
        """The values that shape the weights of a stage, by dotted path; those of the stages before it too."""
        others = set(stages.names()) - {one.name for one in stages.lineage(stage)}
        return {
            path: value
            for path, key, value in self.leaves()
            if key.role in TRAJECTORY and path.split(".")[0] not in others
        }

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, by dotted path, as `trajectory` gives them. Unknown keys are left out.

        Raises UserError where the values together are no recipe, as those of another version may be.
        """
        raw, known = self.model_dump(mode="json", by_alias=True), self.what_decides()
        for path, value in values.items():
            if path in known:
                node, (*sections, key) = raw, path.split(".")
                for section in sections:
                    node[section] = node.get(section) or {}
                    node = node[section]
                node[key] = value
        try:
            recipe = type(self).model_validate(raw)
        except ValidationError as error:
            raise UserError(
                f"the values that the model was trained by are no recipe any more: {error}"
            ) from None
        recipe._file = self._file
        return recipe

    def row_values(self, section: StageSection) -> dict[str, Any]:
        """The values that decide the rows of a stage: its section's own, and what holds for all stages."""
        shared = (leaf for leaf in self.leaves() if leaf[0].split(".")[0] not in stages.names())
        return {path: value for path, key, value in (*shared, *section.leaves()) if key.role is Role.ROWS}

    @classmethod
    def what_decides(cls) -> dict[str, str | None]:
        """What another value means to an evaluation, by dotted path; see `fields.Key`."""
        return {path: key.decides for path, field in declared(cls) if (key := key_of(field))}
