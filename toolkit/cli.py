"""The scripts' command line: options, what they ask for, and user errors as one message with exit code 2."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from toolkit import cards, command, env, hardware, process, world
from toolkit.console.screen import Screen, Steady, bar
from toolkit.console.text import Terminal
from toolkit.data import sets
from toolkit.errors import EXIT_FAULT, EXIT_USER, Interrupted, UserError, exit_code, outcome_of
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.records.data_report import DataReport
from toolkit.records.run_report import RunReport
from toolkit.report import on_finish
from toolkit.run import runlog
from toolkit.run.rundir import RunDir
from toolkit.run.start import on_the_model_itself
from toolkit.training import preflight, processes
from toolkit.training.job import Job

# What the loader, the kernel and torch say where there is no room
NO_MEMORY = (
    "failed to map segment",
    "cannot allocate memory",
    "Cannot allocate memory",
    "can't allocate memory",
)


def options(doc: str, needs_recipe: bool = True, trains: bool = False) -> argparse.ArgumentParser:
    """The options that every script has. Raises UserError where several processes run one that `trains` nothing."""
    if not (trains or world.here().is_alone):
        raise UserError(
            f"{Path(sys.argv[0]).name} runs in one process: start it with python, without a launcher"
        )
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_options(parser, needs_recipe)
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="show warnings, errors and the last line only; log.txt has the rest",
    )
    return parser


def stage_options(doc: str) -> argparse.ArgumentParser:
    """Those that a training stage has beside them."""
    parser = options(doc, trains=True)
    parser.add_argument("--plan", action="store_true", help="show what would run, on what, and stop")
    parser.add_argument("--json", action="store_true", help="with --plan: as JSON")
    parser.add_argument(
        "--world",
        type=_positive,
        metavar="N",
        help="with --plan: for so many processes, each on a card of its own",
    )
    parser.add_argument(
        "--gpu", metavar="NAME|GIB", help="with --plan: for this card instead of the one here"
    )
    parser.add_argument(
        "--price",
        metavar="PER_HOUR",
        help="what the machine costs an hour, in any currency; as --set memory.price_per_hour=...",
    )
    parser.add_argument(
        "--preview",
        nargs="?",
        type=_positive,
        const=2,
        metavar="N",
        help="show N rows of each kind token by token, what is trained and what is masked, and stop (default 2)",
    )
    parser.add_argument(
        "--name", type=_label, metavar="LABEL", help="train a variant of the stage beside it, e.g. beta02"
    )
    parser.add_argument(
        "--from",
        dest="from_",
        metavar="ADAPTER",
        help="continue this adapter: a variant's name, a folder, or base for the model itself",
    )
    parser.add_argument("--fresh", action="store_true", help="move a finished run aside and start again")
    parser.add_argument(
        "--reshard",
        action="store_true",
        help="continue with another number of processes than the run began with",
    )
    parser.add_argument(
        "--if-present", action="store_true", help="do nothing when the recipe lacks this stage"
    )
    on_finish.add_option(parser)
    return parser


def _label(text: str) -> str:
    if not stages.LABEL.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits and dashes between them, e.g. beta02")
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def start(stage: str, doc: str) -> Job | None:
    """What the options ask for short of training; None when that is all, or when there is nothing (more) to run.

    Raises UserError for everything that can be known before torch is imported.
    """
    here = world.here()
    env.keep_apart(here)
    parser = stage_options(doc)
    with silent(unless=here.is_first):  # the first process says what is wrong with the options
        arguments = parser.parse_args()
    if not here.is_first:
        if arguments.plan or arguments.preview:
            return None
        arguments.on_finish = None
    for option in ("json", "gpu", "world"):
        if getattr(arguments, option) and not arguments.plan:
            parser.error(f"--{option} goes with --plan")  # as argparse says other mistakes: exit code 2
    if not (arguments.plan or arguments.preview):
        on_finish.ask(arguments.on_finish)  # a recipe that cannot be read is told, too
    shown = {} if here.is_first else {"file": Steady(None)}
    console = Screen(quiet=arguments.quiet and not (arguments.plan or arguments.preview), **shown)
    if arguments.price:
        arguments.set.append(f"memory.price_per_hour={arguments.price}")
    recipe = load(arguments.recipe, tuple(arguments.set))
    if arguments.if_present and getattr(recipe, stage) is None:
        console.print(f"recipe {escape(recipe.name)} has no {stage} stage: nothing to do")
        return None
    recipe.section(stage)  # raises when there is none
    if arguments.from_ == stages.BASE:
        recipe = on_the_model_itself(recipe, stage)
    run = RunDir(arguments.runs, recipe.name, stages.variant(stage, arguments.name))
    run = run if here.is_first else run.as_read()
    if arguments.preview:
        _preview(recipe, run, arguments.preview, console)
        return None
    if not arguments.plan:
        on_finish.ask(arguments.on_finish, lambda: on_finish.of_run(run))
    machine = hardware.here()
    size = arguments.world or here.size
    if problems := processes.problems(recipe, stage, size):
        raise UserError(*problems)
    plan = _plan(recipe, run, machine, arguments, size)
    job = Job(
        recipe, plan, run, console, arguments.fresh, arguments.from_, world=here, reshard=arguments.reshard
    )
    if arguments.plan:
        preflight.show_and_check(job, arguments.json)
        return None
    if job.is_finished():
        console.print(
            f"{run.name} of {escape(recipe.name)} is finished: {escape(str(run.adapter))}; --fresh moves it aside and "
            "starts again, --name trains another beside it"
        )
        return None
    problems = [*preflight.of_start(job), *job.problems()] if here.is_first else []
    process.prepare(recipe, machine, console, problems, job.plan.settings.loss_chunk_gib, here)
    preflight.show(job)
    return job


def _preview(recipe: Recipe, run: RunDir, num: int, console: Console) -> None:
    """Shows rows as they will be trained: loads the tokenizer, not the model, and leaves a GPU alone."""
    stage = stages.of(run.stage)
    if problems := sets.problems(recipe, recipe.section(stage.name), stage.row_kind):
        raise UserError(*problems)
    from toolkit.doctor import (
        examine,  # brings huggingface_hub along: half a second that no other command pays
    )

    if problems := examine.out_of_reach(recipe, stage):
        raise UserError(*problems)
    env.prepare(recipe.memory.alloc_conf, use_gpu=False)
    from toolkit.engine.data import examples  # transformers brings torch along: only once it is asked for

    examples.run(recipe, stage, num, run, console)


def _plan(
    recipe: Recipe, run: RunDir, machine: hardware.Hardware, arguments: argparse.Namespace, size: int
) -> Plan:
    """For the card that is named, the one here, or, only to be shown, the one that the recipe is made for."""
    named = arguments.gpu or (recipe.gpu if arguments.plan and machine.card is None else None)
    card = cards.card(named) if named else machine.card
    kept = {} if arguments.fresh or arguments.gpu or arguments.world else run.settings()
    if arguments.reshard:
        kept.pop("per_device_train_batch_size", None)
    ram_gib = machine.ram_gib / world.here().local_size
    return plan_stage(recipe, run.stage, card, ram_gib, kept, DataReport.load(run.data_report), size)


@contextmanager
def silent(unless: bool) -> Iterator[None]:
    """Nothing that the block prints is shown."""
    if unless:
        yield
        return
    with redirect_stdout(Steady(None)), redirect_stderr(Steady(None)):
        yield


@contextmanager
def importing(console: Console) -> Iterator[None]:
    """Shows that the libraries are being loaded; it takes seconds, on a cold disk a minute."""
    with bar(console, "loading PyTorch and Unsloth", None), process.without_collecting():
        yield


def result(console: Console, done: str, text: str) -> None:
    """The last line of a script: what is done, and what may be data."""
    console.print(f"[bold green]{done}[/]{escape(text)}")


def finish(report: RunReport, job: Job) -> None:
    """The last lines of a stage."""
    if report.reward_learning:
        said = _rewarded(report.reward_learning)
    else:
        said = f"loss {report.loss_first:.4f} -> {report.loss_last:.4f}" if report.loss_first else ""
        if report.loss_first and report.loss_last and report.loss_last > report.loss_first:
            job.console.print(
                f"[yellow]the loss is higher at the end, {report.loss_last:.4f}, than at the first step, "
                f"{report.loss_first:.4f}: look at its curve before the adapter is used[/]"
            )
    job.console.print(
        f"[bold green]{job.run.name} finished[/] in {report.wall_seconds:.0f} s: {report.num_steps} steps, {said}; "
        f"adapter in {escape(str(job.run.adapter))}"
    )


def _rewarded(learnt: dict[str, Any]) -> str:
    """Of a stage whose loss says nothing: what it was for, and what that was good for."""
    reward, right = learnt.get("reward") or {}, learnt.get("held_out_correct")
    said = f"reward {reward.get('first') or 0:.3f} -> {reward.get('last') or 0:.3f}"
    if right:
        apart = right["difference"]
        said += (
            f"; held-out completions right {right['before']['value']:.1%} -> {right['after']['value']:.1%} "
            f"({apart['low']:+.1%} to {apart['high']:+.1%})"
        )
    return said


def _errors() -> Console:
    return Terminal(file=Steady(sys.stderr))


def _say(*problems: str) -> None:
    console = _errors()
    for problem in problems:
        console.print(Text.assemble(("error:", "bold red"), " ", problem))


def _is_lack_of_memory(error: BaseException) -> bool:
    """Also where it shows as a library that cannot be loaded."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def _what_limits_memory(error: BaseException) -> str:
    said = (str(error).splitlines() or ["MemoryError"])[0] or "MemoryError"
    return f"out of memory ({said}): close other programs, raise `ulimit -v`, or take a machine with more RAM"


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    """As Ctrl-C does: what was begun is taken away, and whoever works for this process ends with it."""
    raise Interrupted(number, "stopped by SIGTERM: nothing was saved as finished")


def run(main: Callable[[], None]) -> None:
    """Runs a script's main. Exit codes: 0 done, 2 the user can fix it, 128 + signal stopped, 1 a fault."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        main()
    except BaseException as error:
        if (code := world.told_by_another(error)) is not None:
            _on_finish(code, str(error))
            sys.exit(code)
        code = _told(error)
        if code is None:
            raise
        _on_finish(code, str(error))
        if code == EXIT_FAULT:
            raise
        sys.exit(code)
    _on_finish(0, "")


def _told(error: BaseException) -> int | None:
    """The exit code of what ended a script, once it is said; None for what is to end it as it is."""
    if isinstance(error, UserError):
        _say(*error.problems)
        return EXIT_USER
    if isinstance(error, Interrupted):
        for number in (signal.SIGINT, signal.SIGTERM):  # one more would only interrupt the way out
            signal.signal(number, signal.SIG_IGN)
        _errors().print(str(error), style="yellow", markup=False)
        return exit_code(error)
    if isinstance(error, KeyboardInterrupt):
        _errors().print("\ninterrupted: nothing was saved as finished", style="yellow")
        return exit_code(error)
    if not isinstance(error, Exception):
        return None
    if _is_lack_of_memory(error):
        _say(_what_limits_memory(error))
        return EXIT_USER
    if runlog.LOG.path:
        _errors().print(
            f"[bold red]an internal error;[/] what led to it is in {escape(str(runlog.LOG.path))}"
        )
    return EXIT_FAULT


def _on_finish(code: int, reason: str) -> None:
    on_finish.tell(outcome_of(code), reason, _errors())
