"""What `--vary` asks for: a run for every combination of values, each a variant of the stage."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit import command
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.records.sweep_report import Sweep
from toolkit.report import on_finish
from toolkit.run.start import on_the_model_itself

SWEEPS = "sweeps"  # the folder of all of a recipe's
SEED = "seed"
MOST_POINTS = 200
COMMA = re.compile(r",(?![^\[{]*[\]}])")  # one that separates values, not what is in one


@dataclass(frozen=True)
class Point:
    """One run: the values of the keys that are varied, as they are written, and the variant's name."""

    name: str
    texts: dict[str, str]
    recipe: Recipe

    @cached_property
    def values(self) -> dict[str, Any]:
        return {path: value_at(self.recipe, path) for path in self.texts}

    def options(self) -> list[str]:
        """What makes the stage's own script train this run."""
        sets = [word for path, text in self.texts.items() for word in ("--set", f"{path}={text}")]
        return ["--name", stages.label_of(self.name) or "", *sets]


@dataclass(frozen=True)
class Asked:
    """A sweep: its points in their order, and where its table and page go."""

    stage: str
    name: str
    folder: Path
    points: tuple[Point, ...]

    def record(self, refused: dict[str, str]) -> Sweep:
        varied = {
            path: list(dict.fromkeys(str(p.values[path]) for p in self.points))
            for path in self.points[0].texts
        }
        return Sweep(
            recipe=self.points[0].recipe.name,
            stage=self.stage,
            varied=varied,
            points={point.name: point.values for point in self.points},
            refused=refused,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", required=True, choices=stages.names(), help="the stage that is trained")
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="PATH=A,B,C",
        help="values of a key of the recipe; given again, every combination is trained",
    )
    parser.add_argument(
        "--name", metavar="LABEL", help="begins the names of the runs, e.g. trial: dpo-trial-beta0p1"
    )
    parser.add_argument(
        "--from", dest="from_", metavar="ADAPTER", help="what every run continues; as of the stage"
    )
    parser.add_argument("--fresh", action="store_true", help="move finished runs aside and start again")
    on_finish.add_option(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--plan", action="store_true", help="show which runs there would be, and stop")
    shown.add_argument(
        "--commands", action="store_true", help="print the command of each run, one a line, and stop"
    )


def asked(arguments: argparse.Namespace) -> Asked:
    """Raises UserError for what cannot be varied, or makes two runs the same."""
    axes = _axes(arguments.vary)
    if arguments.name and not stages.LABEL.fullmatch(arguments.name):
        raise UserError(f"--name {arguments.name}: letters, digits and dashes between them, e.g. trial")
    num = 1
    for values in axes.values():
        num *= len(values)
    if num > MOST_POINTS:
        raise UserError(
            f"--vary asks for {num:,} runs; at most {MOST_POINTS} in one sweep: name fewer values"
        )
    points: list[Point] = []
    problems: dict[str, None] = {}
    for texts in itertools.product(*axes.values()):
        chosen = dict(zip(axes, texts, strict=True))
        try:
            recipe = load(
                arguments.recipe, (*arguments.set, *(f"{path}={text}" for path, text in chosen.items()))
            )
            recipe.section(arguments.stage)
            if arguments.from_ == stages.BASE:
                recipe = on_the_model_itself(recipe, arguments.stage)
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        points.append(Point(_variant(arguments.stage, arguments.name, chosen), chosen, recipe))
    if problems:
        raise UserError(*(_of_vary(problem, axes) for problem in problems))
    _check(arguments.stage, points, axes)
    label = "-".join((arguments.name, *map(_short, axes)) if arguments.name else map(_short, axes))
    name = stages.variant(arguments.stage, label)
    return Asked(arguments.stage, name, arguments.runs / points[0].recipe.name / SWEEPS / name, tuple(points))


def commands(sweep: Asked, arguments: argparse.Namespace) -> list[str]:
    """What trains each run by itself, quoted for a shell: of the same name and values, so that the sweep finds it.

    Raises UserError for an option that such commands cannot keep.
    """
    if arguments.fresh:
        raise UserError(
            "--fresh does not go with --commands: a job that is started again, on another machine, would begin anew "
            "each time; leave it out, or take another --name"
        )
    also = ["--from", arguments.from_] if arguments.from_ else []
    also += ["--on-finish", arguments.on_finish] if arguments.on_finish else []
    also += ["--quiet"] if arguments.quiet else []
    return [
        command.elsewhere(sweep.stage, point.recipe.name, *point.options(), *also) for point in sweep.points
    ]


def value_at(recipe: Recipe, path: str) -> Any:
    """A value of a recipe by its dotted path, ready for JSON."""
    node: Any = recipe.model_dump(mode="json", by_alias=True)
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def _of_vary(problem: str, axes: Iterable[str]) -> str:
    """A problem of an override, in the words of the option that asked for it."""
    is_ours = any(problem.startswith((f"--set {path}=", f"--set {path}:")) for path in axes)
    return problem.replace("--set", "--vary", 1) if is_ours else problem


def _axes(given: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    problems = []
    for text in given:
        path, _, listed = text.partition("=")
        values = [value.strip() for value in COMMA.split(listed)]
        if not path or not all(values):
            problems.append(f"--vary {text}: expected PATH=A,B,C, for example --vary dpo.beta=0.05,0.1")
        elif path in axes:
            problems.append(f"--vary {path} is given twice: name all its values in one")
        else:
            axes[path] = values
    if problems:
        raise UserError(*problems)
    return axes


def _check(stage: str, points: Sequence[Point], axes: dict[str, list[str]]) -> None:
    """Two points that would be one run: a key that this stage does not read, or a value that is given twice."""
    shapes = points[0].recipe.trajectory(stage)
    before = [one.name for one in stages.lineage(stage) if one.name != stage]
    problems = []
    for path in axes:
        section = path.split(".")[0]
        if section in before:
            problems.append(f"--vary {path} changes what {stage} continues: sweep it with --stage {section}")
        elif not any(key == path or path.startswith(f"{key}.") for key in shapes):
            problems.append(f"--vary {path}: it does not shape what {stage} trains, so the runs would be one")
    if problems:
        raise UserError(*problems)
    seen: dict[str, Point] = {}
    for point in points:
        same = seen.setdefault(repr(sorted(point.recipe.trajectory(stage).items())), point)
        if same is not point:
            raise UserError(
                f"--vary: {same.name} and {point.name} would be the same run: name each value once"
            )
    names = [point.name for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"--vary: {', '.join(sorted(twice))} would name two runs: write their values otherwise"
        )


def _variant(stage: str, label: str | None, chosen: dict[str, str]) -> str:
    parts = [label] if label else []
    return stages.variant(
        stage, "-".join([*parts, *(_short(path) + _word(text) for path, text in chosen.items())])
    )


def _short(path: str) -> str:
    return _word(path.rpartition(".")[2])


def _word(text: str) -> str:
    """What may stand in a folder's name: 0.05 as 0p05, -1 as m1."""
    text = re.sub(r"(?<=\d)\.(?=\d)", "p", text)
    text = re.sub(r"^-(?=\d)", "m", text)
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
