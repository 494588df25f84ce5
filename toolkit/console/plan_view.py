"""A plan on the screen: what would run, on what, with which settings; predicted memory item by item."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from toolkit.console.panel import duration
from toolkit.memory.listing import listing
from toolkit.memory.plan import Plan
from toolkit.recipe import stages
from toolkit.recipe.schema import Dpo, Kto, Recipe, Rl

LINK_NAMES = {"pcie4": "PCIe 4.0 x16", "nvlink4": "NVLink 4"}
SLOWEST_SHARE = 0.2  # of the card's full rate: an estimate, until a run on a card is measured


def show_plan(
    recipe: Recipe, plan: Plan, name: str, console: Console, about: Sequence[tuple[str, str]] = ()
) -> None:
    """`name` is the run's: a stage's, or that of a variant; `about` are facts of it, by label."""
    console.print(
        Panel(
            _facts(recipe, plan, about),
            title=escape(f"{name} · {recipe.name}"),
            title_align="left",
            expand=False,
        )
    )
    console.print(_memory(plan))
    console.print(
        f"[dim]longest max_length that fits: {plan.largest_max_length:,}{_of_positions(recipe, plan)}; "
        f"{plan.tokens_per_step:,} tokens a step, {plan.flops_per_token / 1e9:.3g} GFLOP a token[/]"
    )
    if plan.tokens_of_run:
        console.print(
            f"[dim]the rows prepared here: {plan.tokens_of_run:,} tokens through the model in the run[/]"
        )
    if plan.floor_seconds:
        of_rows = "" if plan.tokens_of_run else " of full rows"
        console.print(f"[dim]the run{of_rows}:[/] {_time(plan, plan.floor_seconds)}")
    elif plan.floor_seconds_per_1000_steps:
        console.print(f"[dim]1,000 steps of full rows:[/] {_time(plan, plan.floor_seconds_per_1000_steps)}")


def _time(plan: Plan, floor: float) -> str:
    """Hours and cost of training, between the card's full rate and a rate that few runs are below."""
    slowest = floor / SLOWEST_SHARE
    text = (
        f"{duration(floor)} at the card's full rate, which no run is faster than, to {duration(slowest)} at "
        f"{SLOWEST_SHARE:.0%} of it; its first minute says more"
    )
    if plan.price_per_hour is None:
        return text
    low, high = (seconds / 3600 * plan.price_per_hour for seconds in (floor, slowest))
    return f"{text}. Costs {low:.2f} to {high:.2f} at {plan.price_per_hour:g} an hour"


def _of_positions(recipe: Recipe, plan: Plan) -> str:
    positions = recipe.model.architecture.max_position_embeddings
    return ", all the model's positions" if plan.largest_max_length == positions else ""


def _facts(recipe: Recipe, plan: Plan, about: Sequence[tuple[str, str]]) -> Table:
    section, settings = recipe.section(plan.stage), plan.settings
    micro, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    called, tokens = stages.of(plan.stage).rows_are_called, settings.tokens_per_micro_batch
    rows = f"{micro} x {accumulated} = {micro * accumulated} {called}"
    if tokens:
        rows = f"{micro} {called} in pieces of {tokens:,} tokens,"
    beta = f", beta {section.beta:g}" if isinstance(section, (Dpo, Kto, Rl)) else ""
    rewarded = _of_rl(section) if isinstance(section, Rl) else ()
    length = f"{section.max_steps} steps" if section.max_steps else f"{section.num_train_epochs:g} epochs"
    num_layers = recipe.model.architecture.num_hidden_layers
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ("model", f"{recipe.model.path}{' in 4-bit NF4' if recipe.model.load_in_4bit else ''}"),
        ("data", ", ".join(source.path for source in section.datasets)),
        ("on", plan.card),
        ("batch", f"{rows} of at most {section.max_length} tokens"),
        *rewarded,
        ("optimizer", f"{section.optim}, lr {section.learning_rate:g} {section.lr_scheduler_type}{beta}"),
        ("length", length),
        ("recompute", f"{settings.recompute_layers} of {num_layers} layers"),
        *(_across(plan) if plan.sharing else ()),
        *about,
    ):
        facts.add_row(f"[dim]{label}[/]", escape(value))
    return facts


def _across(plan: Plan) -> Sequence[tuple[str, str]]:
    """The processes, and what they send; computed from the links' full rates."""
    assert plan.sharing is not None
    share = plan.sharing.share or {}
    links = ", ".join(
        f"{1000 * seconds:.3g} ms{f', {share[link]:.1%} of it,' if link in share else ''} over {LINK_NAMES[link]}"
        for link, seconds in plan.sharing.seconds.items()
    )
    return (
        ("processes", f"{plan.processes}, each on a card of its own with the batch above"),
        (
            "sharing",
            f"{plan.sharing.bytes_per_step / 1e6:,.3g} MB a step from each card: {links} at full rate (computed)",
        ),
    )


def _of_rl(section: Rl) -> Sequence[tuple[str, str]]:
    made_of = (
        f"{section.rows_per_step} prompts x {section.num_generations}, {section.generated_at_once} at once"
    )
    rewards = (
        f"{'' if reward.weight == 1 else f'{reward.weight:g} x '}{reward.called}"
        + (f" ({reward.function or reward.model})" if reward.function or reward.model else "")
        for reward in section.rewards
    )
    cut = "as the rewards say" if section.truncated_reward is None else f"{section.truncated_reward:g}"
    return (
        ("writes", f"{made_of}, of at most {section.max_completion_length} tokens each"),
        ("rewards", f"{', '.join(rewards)}; one that is cut: {cut}"),
        ("algorithm", section.algorithm),
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="predicted memory, GiB", title_justify="left", box=None, padding=(0, 2))
    table.add_column("item")
    table.add_column("GiB", justify="right")
    inside, outside = listing(plan.items_gib)
    for item, gib in inside:
        table.add_row(item.replace("_", " "), gib)
    table.add_row("[bold]peak[/]", f"[bold]{plan.peak_gib:.2f}[/]")
    table.add_row("budget", f"{plan.budget_gib:.2f}")
    for item, gib in outside:
        table.add_row(f"[dim]beside it: {item}[/]", f"[dim]{gib}[/]")
    return table
