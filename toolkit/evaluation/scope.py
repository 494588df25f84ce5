"""What an evaluation is of: which models, trained as the recipe says, and which benchmarks. Known before torch is."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from toolkit import command
from toolkit.errors import INSTALL_OPTIONAL, UserError
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import BASE
from toolkit.redaction import marked
from toolkit.run import changes
from toolkit.run.rundir import RunDir


@dataclass(frozen=True)
class Tasks:
    """What --tasks asks of lm-evaluation-harness. `limit` takes the first rows of each task only.

    `chat_template` writes the rows as a conversation for every model that was trained on the template.
    """

    names: tuple[str, ...]
    path: str | None
    limit: int | None
    chat_template: bool


@dataclass(frozen=True)
class Scope:
    """`notes` say what of the recipe has changed since a model was trained."""

    models: tuple[str, ...]
    tasks: Tasks | None
    notes: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of run_eval.py."""
    parser.add_argument(
        "--models",
        metavar="NAMES",
        help=f"of {BASE}, {', '.join(stages.answering())} and variants, as dpo-beta02 (default: base, finished stages)",
    )
    tasks = parser.add_argument_group("benchmarks, with EleutherAI's lm-evaluation-harness")
    tasks.add_argument("--tasks", metavar="NAMES", help="its task names, e.g. arc_easy,hellaswag")
    tasks.add_argument("--tasks-path", metavar="DIR", help="a folder with task files of your own")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task, for a try")
    tasks.add_argument(
        "--no-chat-template",
        action="store_true",
        help="ask every model in plain text, as published numbers of base models are made",
    )


def choose(recipe: Recipe, run: RunDir, arguments: argparse.Namespace) -> Scope:
    """Raises UserError with every problem: an unknown or unfinished model, one that is not to be used, another recipe,
    no harness installed."""
    models, problems = _models(recipe, run, arguments.models)
    notes = []
    for name in models:
        refused, noted = _changed(recipe, run.of(name)) if name != BASE else ([], [])
        problems += refused
        notes += noted
        if name != BASE and not refused:
            try:
                run.of(name).check_adapter()
            except UserError as error:
                problems += error.problems
    tasks = _tasks(arguments, problems)
    if problems:
        raise UserError(*problems)
    return Scope(models, tasks, tuple(notes))


def _models(recipe: Recipe, run: RunDir, asked: str | None) -> tuple[tuple[str, ...], list[str]]:
    """The models asked for, else the base and every finished stage; and what is wrong with them."""
    finished = [name for name in run.finished() if stages.of(name).answers]
    known = [stage.name for stage in recipe.stages() if stage.answers]
    names = [name.strip() for name in asked.split(",")] if asked else [BASE, *(set(finished) & set(known))]
    if not asked and len(names) == 1:
        names += known
    problems = [
        f"--models {name!r} is no model of a recipe: choose from "
        f"{', '.join(dict.fromkeys([BASE, *stages.answering(), *finished]))}"
        for name in names
        if name != BASE and not stages.is_variant(name)
    ]
    there = [name for name in names if name == BASE or stages.is_variant(name)]
    absent = [name for name in there if name != BASE and name not in finished]
    for name in absent:
        stage, label = stages.of(name).name, stages.label_of(name)
        if stage not in known:
            problems.append(f"recipe {recipe.name} has no {stage} stage: leave {name} out of --models")
        else:
            train = command.propose(stage, recipe.name, *(["--name", label] if label else []))
            problems.append(f"no finished adapter in {run.of(name).adapter}: run `{train}` first")
    return tuple(stages.in_order(dict.fromkeys(name for name in there if name not in absent))), problems


def _changed(recipe: Recipe, run: RunDir) -> tuple[list[str], list[str]]:
    """What the recipe says otherwise than when a model was trained: what forbids an evaluation, what is only said."""
    mark = run.finished_with()
    if mark is None:
        return [], []
    decides, before, now = recipe.what_decides(), mark.trajectory or {}, recipe.trajectory(run.stage)
    left_out = {name for name in stages.names() if before.get(name, name) is None}  # trained without these
    changed = {
        field: text
        for field, text in changes.between(before, marked(now)).items()
        if decides.get(field) != "held_out" and field.split(".")[0] not in left_out
    }
    changed |= {name: f"{name}: null then" for name in sorted(left_out - now.keys())}
    # held-out rows were split off the training rows: of another split they may have been trained on
    split_off = [stage.name for stage in recipe.stages() if recipe.section(stage.name).eval_rows]
    decisive = [
        field
        for field in changed
        if decides.get(field) == "model"
        or (decides.get(field) == "split" and split_off and field.split(".")[0] in ("seed", *split_off))
    ]
    if decisive:
        listed = "; ".join(changed[field] for field in decisive)
        return [
            f"{run.adapter} was trained with another recipe, so its numbers would not be its own; give the same "
            f"--set as then, or train it again. Changed: {listed}"
        ], []
    return [], [
        f"{run.name} was trained otherwise than the recipe says now: {'; '.join(changed.values())}"
    ] * bool(changed)


def _tasks(arguments: argparse.Namespace, problems: list[str]) -> Tasks | None:
    if not arguments.tasks:
        problems += [
            f"--{option.replace('_', '-')} is for --tasks, and there are none"
            for option in ("tasks_path", "limit", "no_chat_template")
            if getattr(arguments, option)
        ]
        return None
    if arguments.limit is not None and arguments.limit < 1:
        problems.append(f"--limit {arguments.limit}: a number of rows from 1 up is expected")
    if arguments.tasks_path and not Path(arguments.tasks_path).is_dir():
        problems.append(f"--tasks-path {arguments.tasks_path}: there is no such folder")
    if find_spec("lm_eval") is None:
        problems.append(f"--tasks needs lm-evaluation-harness: {INSTALL_OPTIONAL}")
    names = tuple(filter(None, (name.strip() for name in arguments.tasks.split(","))))
    return Tasks(names, arguments.tasks_path, arguments.limit, not arguments.no_chat_template)
