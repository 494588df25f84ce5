"""What `run_new.py` is asked for, and whatever of it can be known to be wrong at once."""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import cards
from toolkit.data.sources import is_readable
from toolkit.drafting.draft import Choice, Draft, required
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.fields import sections_in
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import Stage


@dataclass(frozen=True)
class Request:
    """`sets` are the rows of each stage, `gpu` a card by name; None where the machine here decides."""

    model: str
    sets: dict[str, str]
    gpu: str | None
    draft: Draft

    @property
    def stages(self) -> list[Stage]:
        return [stages.of(name) for name in self.sets]


def parse(doc: str, words: Sequence[str] | None = None) -> Request:
    """Raises UserError with all that is wrong."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="ID|FOLDER", help="a Hub id, or a model's folder")
    for stage in _of_rows_alone():
        parser.add_argument(f"--{stage.name}", metavar="DATA", help=f"rows of {stage.title.lower()}")
    parser.add_argument("--gpu", metavar="NAME", help="the card it is made for (default: the one here)")
    parser.add_argument("--out", metavar="FILE", help="the recipe to write (default: MODEL.yaml, here)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a value of the recipe that you know better, e.g. dpo.beta=0.2; may be given again",
    )
    arguments = parser.parse_args(words)
    sets = {stage.name: path for stage in _of_rows_alone() if (path := getattr(arguments, stage.name))}
    file = Path(os.path.expanduser(arguments.out or f"{_plain(arguments.model)}.yaml")).absolute()
    if problems := [*_of_paths(arguments.model, sets, file), *_of_card(arguments.gpu)]:
        raise UserError(*problems)
    choices = {"model.path": Choice(as_written(arguments.model, file), "as asked for")}
    choices |= {
        f"{name}.datasets": Choice([{"path": as_written(path, file)}], "") for name, path in sets.items()
    }
    return Request(
        os.path.expanduser(arguments.model), sets, arguments.gpu, Draft(file, choices, tuple(arguments.set))
    )


def _of_paths(model: str, sets: dict[str, str], file: Path) -> Iterator[str]:
    """What is wrong with the paths that were named."""
    if _is_path(model) and not Path(os.path.expanduser(model)).is_dir():
        yield f"--model {model}: there is no such folder"
    if not sets:
        yield f"no rows: name them with {' or '.join(f'--{stage.name}' for stage in _of_rows_alone())}"
    for name, path in sets.items():
        if _is_path(path) and not glob.glob(os.path.expanduser(path)):
            yield f"--{name} {path}: there is no such file or folder"
    if file.suffix not in (".yaml", ".yml"):
        yield f"--out {file}: a recipe's name ends in .yaml"
    elif file.exists():
        yield f"{file} is there already: name another with --out, or remove it"


def _of_card(name: str | None) -> Iterator[str]:
    if name is None or cards.known_card(name):
        return
    try:
        cards.card(name)
    except UserError as error:
        yield from error.problems
    else:
        yield f"--gpu {name}: a recipe names its card; known are {', '.join(cards.CARDS)}"


def as_written(path: str, file: Path) -> str:
    """A path of this machine as the recipe `file` names it: beside itself, else in full; a Hub id as it is."""
    path = os.path.expanduser(path)
    if not (os.path.exists(path) or glob.glob(path)):
        return path
    full = os.path.abspath(path)
    return str(Path(full).relative_to(file.parent)) if Path(full).is_relative_to(file.parent) else full


def _is_path(text: str) -> bool:
    """Whether it can only be meant as a path of this machine: a Hub id is a name, or an owner and a name."""
    return text.startswith(("/", ".", "~")) or text.count("/") > 1 or is_readable(text)


def _of_rows_alone() -> list[Stage]:
    """The stages that rows are enough for."""
    return [
        stage
        for stage in stages.STAGES.values()
        if required(sections_in(Recipe.model_fields[stage.name].annotation)[0]) == {"datasets"}
    ]


def _plain(model: str) -> str:
    """A file's name for a model: Qwen/Qwen3-8B is qwen3_8b."""
    return re.sub(r"[^a-z0-9]+", "_", Path(model).name.lower()).strip("_") or "recipe"
