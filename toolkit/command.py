"""Commands in messages, as whoever reads them can paste them: with the interpreter, recipe and options in use."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

RUNS = Path("runs")


def add_options(parser: argparse.ArgumentParser, needs_recipe: bool = True) -> None:
    """The options that mean the same to every script, so a command that is proposed repeats them."""
    parser.add_argument(
        "--recipe", required=needs_recipe, metavar="NAME", help="a name in recipes/, or a path to a YAML"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a value of the recipe, e.g. dpo.beta=0.2; may be given again",
    )
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where runs are written")


def propose(script: str, recipe: str, *options: str) -> str:
    """`python run_dpo.py --recipe tiny ...` for the script "dpo": with the options that this process was given.

    `recipe` stands where no script of ours runs, as in a test.
    """
    words, given = _in_use(script)
    return shlex.join([*words, *_repeated(given, recipe), *options])


def elsewhere(script: str, recipe: str, *options: str) -> str:
    """The same as it is typed in any clone, whatever this process was started by."""
    _, given = _in_use(script)
    return shlex.join(["python", f"run_{script}.py", *_repeated(given, recipe), *options])


def _repeated(given: argparse.Namespace, recipe: str) -> list[str]:
    repeated = ["--recipe", given.recipe or recipe]
    if given.runs != RUNS:
        repeated += ["--runs", str(given.runs)]
    for override in given.set:
        repeated += ["--set", override]
    return repeated


def _in_use(script: str) -> tuple[list[str], argparse.Namespace]:
    """Interpreter and script as they were called, and the options of every script that this process was given."""
    running = Path(sys.argv[0])
    is_ours = running.name.startswith("run_") and running.suffix == ".py"
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, needs_recipe=False)
    given, _ = parser.parse_known_args(sys.argv[1:] if is_ours else [])
    name = f"run_{script}.py"
    return ([sys.orig_argv[0], str(running.with_name(name))] if is_ours else ["python", name]), given
