"""The scripts' command line: options, the plan on screen, and user errors as one message with exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from toolkit import env, hardware
from toolkit.console.screen import Screen, bar
from toolkit.data import sets
from toolkit.errors import Interrupted, UserError
from toolkit.memory.plan import Plan, keeping, plan_stage
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Dpo, Recipe
from toolkit.records.run_report import RunReport
from toolkit.run import runlog
from toolkit.run.rundir import RunDir
from toolkit.training import trackers
from toolkit.training.job import Job

EXIT_USER, EXIT_INTERRUPTED = 2, 130


def options(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", required=True, metavar="NAME", help="a name in recipes/, or a path to a YAML"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a value of the recipe, e.g. dpo.beta=0.2; may be given again",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written"
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="show warnings, errors and the last line only; log.txt has the rest",
    )
    return parser


def start(stage: str, doc: str) -> Job | None:
    """Reads the recipe, plans the stage and prepares the process; None when there is nothing (more) to run.

    Raises UserError for everything that can be known before torch is imported.
    """
    parser = options(doc)
    parser.add_argument("--plan", action="store_true", help="show what would run, on what, and stop")
    parser.add_argument("--json", action="store_true", help="with --plan: as JSON")
    parser.add_argument(
        "--gpu", metavar="NAME|GIB", help="with --plan: for this card instead of the one here"
    )
    parser.add_argument(
        "--preview",
        nargs="?",
        type=_positive,
        const=2,
        metavar="N",
        help="show N rows of each kind token by token, what is trained and what is masked, and stop (default 2)",
    )
    parser.add_argument("--fresh", action="store_true", help="move a finished run aside and start again")
    parser.add_argument(
        "--if-present", action="store_true", help="do nothing when the recipe lacks this stage"
    )
    arguments = parser.parse_args()
    console = Screen(quiet=arguments.quiet and not (arguments.plan or arguments.preview))
    recipe = load(arguments.recipe, tuple(arguments.set))
    if arguments.if_present and getattr(recipe, stage) is None:
        console.print(f"recipe {recipe.name} has no {stage} stage: nothing to do")
        return None
    recipe.section(stage)
    if arguments.preview:
        preview(recipe, stage, arguments.preview, RunDir(arguments.runs, recipe.name, stage), console)
        return None
    machine = hardware.here()
    named = arguments.gpu or (recipe.gpu if arguments.plan and machine.card is None else None)
    card = hardware.card(named) if named else machine.card
    run = RunDir(arguments.runs, recipe.name, stage)
    kept = {} if arguments.fresh or arguments.gpu else run.settings()
    plan = plan_stage(keeping(recipe, kept), stage, card, machine.ram_gib)
    if kept and not plan.fits:
        fix = "--fresh: begins again with settings that fit; those of the unfinished run here are kept otherwise"
        plan = dataclasses.replace(plan, fixes=(fix,))
    if arguments.plan:
        print(json.dumps(plan.to_dict(), indent=2)) if arguments.json else show_plan(
            recipe, stage, plan, console
        )
        if not plan.fits:
            raise UserError(does_not_fit(recipe, plan))
        return None
    if not arguments.fresh and run.is_finished(recipe.trajectory(stage)):
        console.print(
            f"{stage} of {recipe.name} is finished: {run.adapter}; --fresh moves it aside and starts again"
        )
        return None
    run.starting_adapter(recipe.starts_from(stage))  # a missing one is said before torch is loaded
    prepare(recipe, machine, console, plan)
    show_plan(recipe, stage, plan, console)
    return Job(recipe, plan, run, console, arguments.fresh)


def preview(recipe: Recipe, stage: str, num: int, run: RunDir, console: Console) -> None:
    """Shows rows as they will be trained: loads the tokenizer, not the model, and leaves a GPU alone."""
    if problems := sets.problems(recipe, recipe.section(stage), stages.of(stage).row_kind):
        raise UserError(*problems)
    env.prepare(recipe.memory.alloc_conf, use_gpu=False)
    from toolkit.engine.data import examples  # transformers brings torch along: only once it is asked for

    examples.run(recipe, stages.of(stage), num, run, console)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows from 1 up")
    return int(text)


def prepare(recipe: Recipe, machine: hardware.Hardware, console: Console, plan: Plan | None = None) -> None:
    """Checks the machine, sets the process environment and says whose allocator setting holds.

    Raises UserError with whatever is wrong with the machine, and with the plan or the sets of a stage.
    """
    problems = hardware.check(recipe.gpu, machine, hardware.torch_build())
    if plan and not plan.fits:
        problems.append(does_not_fit(recipe, plan))
    if plan:
        section = recipe.section(plan.stage)
        problems += sets.problems(recipe, section, stages.of(plan.stage).row_kind)
        problems += trackers.problems(plan.stage, section.report_to)
    if problems:
        raise UserError(*problems)
    loss_chunk_gib = plan.settings.loss_chunk_gib if plan else None
    environment = env.prepare(recipe.memory.alloc_conf, machine.card is not None, loss_chunk_gib)
    if environment.alloc_source != "recipe":
        console.print(
            f"[yellow]allocator: {environment.alloc_conf} from the exported {environment.alloc_source} "
            f"wins over the recipe's {recipe.memory.alloc_conf}[/]"
        )


@contextmanager
def importing(console: Console) -> Iterator[None]:
    """Shows that the libraries are being loaded; it takes seconds, on a cold disk a minute."""
    with bar(console, "loading PyTorch and Unsloth", None):
        yield


def does_not_fit(recipe: Recipe, plan: Plan) -> str:
    fixes = " ".join(f"({number}) {fix}" for number, fix in enumerate(plan.fixes, 1))
    return (
        f"{plan.stage} of {recipe.name} does not fit: predicted peak {plan.peak_gib:.1f} GiB, "
        f"budget {plan.budget_gib:.1f} GiB on {plan.card}. {fixes}"
    )


def show_plan(recipe: Recipe, stage: str, plan: Plan, console: Console) -> None:
    """What would run, on what, with which settings; predicted memory item by item."""
    section, settings = recipe.section(stage), plan.settings
    micro, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    batch, what = f"{micro} x {accumulated} = {micro * accumulated}", stages.of(stage).rows_are_called
    beta = f", beta {section.beta:g}" if isinstance(section, Dpo) else ""
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ("model", f"{recipe.model.path}{' in 4-bit NF4' if recipe.model.load_in_4bit else ''}"),
        ("data", ", ".join(source.path for source in section.datasets)),
        ("on", plan.card),
        ("batch", f"{batch} {what} of at most {section.max_length} tokens"),
        ("optimizer", f"{section.optim}, lr {section.learning_rate:g} {section.lr_scheduler_type}{beta}"),
        (
            "length",
            f"{section.max_steps} steps" if section.max_steps else f"{section.num_train_epochs:g} epochs",
        ),
        (
            "recompute",
            f"{settings.recompute_layers} of {recipe.model.architecture.num_hidden_layers} layers",
        ),
    ):
        facts.add_row(f"[dim]{label}[/]", value)
    console.print(Panel(facts, title=f"{stage} · {recipe.name}", title_align="left", expand=False))
    table = Table(title="predicted memory, GiB", title_justify="left", box=None, padding=(0, 2))
    table.add_column("item")
    table.add_column("GiB", justify="right")
    for item, gib in plan.items_gib.items():
        if gib >= 0.005:
            table.add_row(item.replace("_", " "), f"{gib:.2f}")
    table.add_row("[bold]peak[/]", f"[bold]{plan.peak_gib:.2f}[/]")
    table.add_row("budget", f"{plan.budget_gib:.2f}")
    console.print(table)
    console.print(
        f"[dim]longest max_length that fits: {plan.largest_max_length:,}; "
        f"{plan.tokens_per_step:,} tokens a step, {plan.flops_per_token / 1e9:.3g} GFLOP a token[/]"
    )
    if plan.floor_seconds_per_1000_steps:
        console.print(
            f"[dim]floor of the time, at the card's full rate: {plan.floor_seconds_per_1000_steps / 60:,.0f} min "
            "for 1,000 steps of full rows; no run is faster[/]"
        )


def finish(report: RunReport, job: Job) -> None:
    """The last lines of a stage."""
    loss = f"loss {report.loss_first:.4f} -> {report.loss_last:.4f}" if report.loss_first else ""
    job.console.print(
        f"[bold green]{report.stage} finished[/] in {report.wall_seconds:.0f} s: {report.num_steps} steps, "
        f"{loss}; adapter in {job.run.adapter}"
    )


def run(main: Callable[[], None]) -> None:
    """Runs a script's main. Exit codes: 0 done, 2 the user can fix it, 128 + signal stopped, 1 a fault."""
    try:
        main()
    except UserError as error:
        console = Console(stderr=True, highlight=False)
        for problem in error.problems:
            console.print("[bold red]error:[/] ", end="")
            console.print(problem, markup=False, soft_wrap=True)
        sys.exit(EXIT_USER)
    except Interrupted as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would only interrupt the way out
        Console(stderr=True).print(str(stopped), style="yellow")
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        Console(stderr=True).print("\ninterrupted: nothing was saved as finished", style="yellow")
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        if runlog.LOG.path:
            Console(stderr=True, highlight=False).print(
                f"[bold red]an internal error;[/] what led to it is in {runlog.LOG.path}", soft_wrap=True
            )
        raise
