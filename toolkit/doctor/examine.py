"""Every check in the order in which one would look: the machine, the network, then what the recipe asks of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants

from toolkit import env, hardware
from toolkit.data import sets
from toolkit.doctor import hub, machine
from toolkit.doctor.check import Check, judged, ok
from toolkit.doctor.hub import Repository
from toolkit.hardware import Hardware
from toolkit.memory import terms
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import Stage
from toolkit.run.rundir import RunDir
from toolkit.training import trackers


def examine(recipe: Recipe | None, runs: Path) -> list[Check]:
    """What is found on this machine; of `recipe` too, where one is given. Loads no torch, asks the Hub once."""
    here = hardware.here()
    plans = _plans(recipe, runs, here)
    repositories = _repositories(recipe, recipe.stages()) if recipe else []
    answers = _answers(repositories)
    checks = [
        machine.python(),
        machine.torch(here.gpu),
        machine.unsloth(),
        machine.driver(here),
        machine.gpu(here, recipe.gpu if recipe else None),
        machine.bf16(here.gpu),
        machine.vram(here.gpu, max(map(_needed_gib, plans), default=None)) if here.gpu else None,
        machine.attention() if here.gpu and find_spec("torch") else None,
        machine.ram(here),
        *_disks(repositories, plans, recipe, runs),
        hub.hub(answers.get("hub")),
        hub.tokens(),
    ]
    found = [check for check in checks if check]
    return [*found, *_of_recipe(recipe, plans, repositories, answers)] if recipe else found


def out_of_reach(recipe: Recipe, stage: Stage) -> list[str]:
    """The model and the sets of a stage that are neither on this machine nor to be had from the Hub, asked for 2 s."""
    lacking = [one for one in _repositories(recipe, [stage]) if not hub.is_begun(one)]
    if not lacking:
        return []
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set: unset it, or fetch it once while online"
        return [f"{one.kind} {one.path} is not in the local cache and {why}" for one in lacking]
    answers = hub.ask({one.path: one.url for one in lacking})
    return [
        f"{one.kind} {one.path} is not in the local cache, and cannot be had: {problem}"
        for one in lacking
        if (problem := answers[one.path].problem)
    ]


def _plans(recipe: Recipe | None, runs: Path, here: Hardware) -> list[Plan]:
    """The plan of each stage; none where the recipe's card is missing anyway."""
    if recipe is None or hardware.missing_gpu(recipe.gpu, here):
        return []
    return [
        plan_stage(
            recipe,
            stage.name,
            here.card,
            here.ram_gib,
            RunDir(runs, recipe.name, stage.name).settings(),
        )
        for stage in recipe.stages()
    ]


def _needed_gib(plan: Plan) -> float:
    return plan.peak_gib + plan.items_gib["context"]


def _repositories(recipe: Recipe, of: Sequence[Stage]) -> list[Repository]:
    """The model and the sets that are not on this machine's disk by themselves, each once."""
    found = [Repository("model", recipe.model.path, recipe.model.revision)]
    for stage in of:
        section = recipe.section(stage.name)
        for source in (*section.datasets, *section.eval_datasets):
            if not sets.is_local_file(recipe, source):
                found.append(Repository("data set", source.path, source.revision))
    return [one for one in dict.fromkeys(found) if not Path(recipe.locate(one.path)).exists()]


def _answers(repositories: list[Repository]) -> dict[str, hub.Answer]:
    """What the Hub says, by path; nothing where HF_HUB_OFFLINE forbids to ask."""
    if constants.HF_HUB_OFFLINE:
        return {}
    urls = {one.path: one.url for one in repositories if hub.cached_gib(one) is None}
    return hub.ask({"hub": f"{constants.ENDPOINT}/robots.txt"} | urls)


def _disks(
    repositories: list[Repository], plans: list[Plan], recipe: Recipe | None, runs: Path
) -> Iterator[Check]:
    """Disk of the caches and of runs/, against what is known to be written there."""
    absent = any(one.kind == "model" and hub.cached_gib(one) is None for one in repositories)
    weights = max(map(_weights_gib, plans), default=None) if absent else None
    yield machine.disk("disk of the Hub", Path(constants.HF_HUB_CACHE), weights)
    yield machine.disk("disk of caches", env.cache_folder())
    written = sum(_run_gib(recipe, plan) for plan in plans) if recipe and plans else None
    yield machine.disk("disk of runs", runs.absolute(), written)


def _weights_gib(plan: Plan) -> float:
    """As they lie on the card: a repository that is not quantised yet holds up to four times as much."""
    return plan.items_gib["weights"] + plan.items_gib["embeddings_and_head"]


def _run_gib(recipe: Recipe, plan: Plan) -> float:
    """The adapter and its checkpoints, one more while they rotate."""
    return terms.saved_gib(plan.items_gib["lora"], recipe.section(plan.stage).save_total_limit + 1)


def _of_recipe(
    recipe: Recipe, plans: list[Plan], repositories: list[Repository], answers: dict[str, hub.Answer]
) -> Iterator[Check]:
    if not any(one.kind == "model" for one in repositories):
        yield ok("model", f"{recipe.model.path}: a folder here")
    for one in repositories:
        yield hub.repository(one, answers.get(one.path))
    for stage in recipe.stages():
        section = recipe.section(stage.name)
        problems = sets.problems(recipe, section, stage.row_kind)
        local = [s.path for s in section.datasets if sets.is_local_file(recipe, s)]
        if local or problems:
            yield judged("data", f"{stage.name}: {', '.join(local)}", " ".join(problems) or None)
        if section.report_to:
            problems = trackers.problems(stage.name, section.report_to)
            yield judged(
                "trackers", f"{stage.name}: {', '.join(section.report_to)}", " ".join(problems) or None
            )
    for plan in plans:
        found = f"{plan.stage}: predicted peak {plan.peak_gib:.1f} of {plan.budget_gib:.1f} GiB"
        yield judged("memory", found, plan.problem(recipe.name))
