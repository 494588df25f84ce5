"""Where the rewards of a recipe come from, and what is plainly wrong with that before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from toolkit import command
from toolkit.recipe import stages
from toolkit.recipe.rl_section import RewardTerm
from toolkit.recipe.schema import Recipe, Rl, StageSection
from toolkit.rewards.user_function import UserFunction
from toolkit.run.rundir import RunDir


def model_path(recipe: Recipe, run: RunDir, reward: RewardTerm) -> str:
    """Where a reward model is: the folder of a run by its name, a path, or a Hub id as it is."""
    assert reward.model is not None
    if stages.is_variant(reward.model):
        return str(run.of(reward.model).path)
    return recipe.locate(reward.model)


def problems(recipe: Recipe, run: RunDir, section: StageSection) -> list[str]:
    """A function's file that cannot be read or lacks it, a reward model that is not there or answers."""
    if not isinstance(section, Rl):
        return []
    found = []
    for reward in section.rewards:
        if reward.function:
            file = reward.function.rpartition(":")[0]
            found.append(UserFunction.of(recipe, reward.function).problem(recipe.looked_in(file)))
        if reward.model:
            found.append(_of_model(recipe, run, reward))
    return [problem for problem in found if problem]


def _of_model(recipe: Recipe, run: RunDir, reward: RewardTerm) -> str | None:
    name = reward.model or ""
    if not stages.is_variant(name):
        is_path = name.startswith(("/", "./", "../")) or len(name.split("/")) != 2
        if is_path and not Path(recipe.locate(name)).is_dir():
            return f"reward model {name}: there is no such folder{recipe.looked_in(name)}"
        return None
    if stages.of(name).answers:
        return f"reward model {name}: that stage answers; a reward model is made by run_reward.py"
    if run.of(name).finished_with() is None:
        label = stages.label_of(name)
        made = command.propose(stages.of(name).name, recipe.name, *(["--name", label] if label else []))
        return f"reward model {name}: no finished adapter in {run.of(name).adapter}; run `{made}` first"
    return None
