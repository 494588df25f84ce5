"""The memory plan of a stage: GiB per item, the settings that fit, and the floor of the time they take.

Predicted from `phases.py` and `terms.py`; nothing here was measured by us. Imports no torch and
answers in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolkit.cards import CARDS, Card
from toolkit.hardware import GIB
from toolkit.memory import terms
from toolkit.memory.phases import Phases, Settings
from toolkit.memory.search import LONGEST, Search, largest_max_length
from toolkit.recipe import stages
from toolkit.recipe.schema import Dpo, Kto, Recipe, Rl
from toolkit.records.data_report import DataReport

__all__ = ["Plan", "Settings", "plan_stage"]

NUM_FIXES = 3
BEGIN_AGAIN = (
    "--fresh: begins again with settings that fit; those of the unfinished run here are kept otherwise"
)

# Bytes a second in one direction. PCIe 4.0: 16 GT/s on 16 lanes, 128 of 130 bits (PCI-SIG); cards without peer-to-peer
# access, as the RTX 4090, go through the host's memory and take about twice as long (an estimate). NVLink 4: 18 links
# of 25 GB/s (NVIDIA H100 white paper).
LINKS = {"pcie4": 16e9 * 16 * 128 / 130 / 8, "nvlink4": 450e9}

# What sharing takes of a card beside the budget: a bucket of gradients, its sum, and NCCL's own buffers (an estimate).
SHARING_GIB = 0.4

# Every plan has these items, in this order.
ITEMS = (
    "weights",
    "embeddings_and_head",
    "reward_models",
    "lora",
    "optimizer",
    "activations_kept",
    "recomputed_inputs",
    "layer_backward",
    "loss",
    "reference_pass",
    "evaluation_pass",
    "generation",
    "scoring_pass",
    "dequantisation",
    "buffers",
    "context",
    "reserve",
)


@dataclass(frozen=True)
class Sharing:
    """What several processes send in a step: the gradients of the LoRA weights, summed once.

    `bytes_per_step` leave each card (and reach it) in a ring of `n`: 2 (n - 1) / n of the gradients (Patarasuk and
    Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002). `seconds` and `share` of a step's floor by kind of link, computed at
    its full rate; None where the card's rates are unknown.
    """

    bytes_per_step: int
    seconds: dict[str, float]
    share: dict[str, float] | None

    @classmethod
    def of(cls, gradient_bytes: float, processes: int, step_seconds: float | None) -> Sharing:
        sent = 2 * (processes - 1) / processes * gradient_bytes
        seconds = {link: sent / rate for link, rate in LINKS.items()}
        share = (
            {link: spent / (step_seconds + spent) for link, spent in seconds.items()}
            if step_seconds
            else None
        )
        return cls(round(sent), seconds, share)


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one stage on one card, and the floor of its time.

    `items_gib` is what is there at the moment of the peak: without `context` and `reserve`, which lie outside
    the budget, its values add up to `peak_gib`, and what belongs to another moment is 0. `phases_gib` is the
    peak of each moment. `peak_gib` is that of the worst micro-batch: rows of `max_length` tokens.

    `largest_max_length`: tokens per row that fit in the most frugal settings that the recipe leaves open, and into
    the model's positions; 0 if none. `tokens_per_step` and the floors hold for rows of full length. The floors are
    seconds at the card's full rates: no such run is faster. None where the rates are unknown, `floor_seconds` too where
    neither max_steps is set nor the rows are known. Where they are, `tokens_of_run` is what goes through the model in
    training, without padding, and `floor_seconds` is of that and of the reference pass. `fixes`: the three
    cheapest changes with the figure that each brings; none when it fits. `price_per_hour` is the recipe's.

    With `processes` on a card each, memory and `settings` are those of one of them, tokens those of all; the floors
    hold what `sharing` costs on links of PCIe.
    """

    stage: str
    card: str
    items_gib: dict[str, float]
    phases_gib: dict[str, float]
    peak_gib: float
    budget_gib: float
    fits: bool
    settings: Settings
    largest_max_length: int
    tokens_per_step: int
    flops_per_token: float
    floor_seconds_per_1000_steps: float | None
    floor_seconds: float | None
    tokens_of_run: int | None
    fixes: tuple[str, ...]
    price_per_hour: float | None = None
    processes: int = 1
    sharing: Sharing | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; the keys are the fields."""
        return asdict(self) | {"fixes": list(self.fixes)}

    def problem(self, recipe_name: str) -> str | None:
        """That it does not fit, with the fixes; None when it does."""
        if self.fits:
            return None
        fixes = " ".join(f"({number}) {fix}" for number, fix in enumerate(self.fixes, 1))
        return (
            f"{self.stage} of {recipe_name} does not fit: predicted peak {self.peak_gib:.1f} GiB, "
            f"budget {self.budget_gib:.1f} GiB on {self.card}. {fixes}"
        )


def plan_stage(
    recipe: Recipe,
    stage: str,
    card: Card | None,
    ram_gib: float,
    kept: Mapping[str, Any] | None = None,
    rows: DataReport | None = None,
    processes: int = 1,
) -> Plan:
    """Plans `stage` for `card`, or for a CPU with `ram_gib` of RAM when it is None.

    `auto` in the recipe's `memory` is spent where it buys most time (see `search`), but for what is `kept`: fields of
    `memory` as an earlier plan chose them for a run that is unfinished. Another choice, on a card with other memory,
    would give other sums and other bits. `rows` are those of the run, once they were prepared: they tell its time.
    Of several `processes` each has its part of the effective batch, which `training.processes` has found to divide, and
    a card like this one. Raises UserError when the recipe lacks the stage.
    """
    left_open = {
        name: value for name, value in (kept or {}).items() if getattr(recipe.memory, name) == "auto"
    }
    recipe = _with(recipe, "memory", recipe.memory.model_copy(update=left_open))
    if processes > 1:
        section = recipe.section(stage)
        own = {"effective_batch_size": section.effective_batch_size // processes}
        recipe = _with(recipe, stages.of(stage).name, section.model_copy(update=own))
        rows = rows and _part_of(rows, processes)
        card = card and replace(card, total_gib=card.total_gib - SHARING_GIB)
    plan = _with_rows(_plan(recipe, stage, card, ram_gib), recipe, card, rows)
    if processes > 1:
        plan = _across(plan, recipe, processes, Phases(recipe, stage, on_gpu=card is not None).adapter)
    return replace(plan, fixes=(BEGIN_AGAIN,)) if kept and not plan.fits else plan


def _with_rows(plan: Plan, recipe: Recipe, card: Card | None, rows: DataReport | None) -> Plan:
    """The plan with tokens and time of these very rows."""
    section = recipe.section(plan.stage)
    if rows is None or not rows.used or not rows.tokens_per_epoch or isinstance(section, Rl):
        return plan  # how long completions become nobody knows
    tokens = rows.tokens_per_epoch
    if isinstance(section, Dpo) and section.share_prompts:
        tokens -= rows.prompt_tokens_per_epoch or 0
    epochs = section.num_train_epochs
    if section.max_steps is not None:
        epochs = section.max_steps * section.effective_batch_size / rows.used
    of_run = round(epochs * tokens)
    plan = replace(plan, tokens_of_run=of_run)
    steps = epochs * rows.used / section.effective_batch_size
    micro_batches = max(1.0, steps * plan.settings.num_micro_batches(round(of_run / max(steps, 1))))
    seconds = _seconds(recipe, plan.stage, card, plan.settings, of_run, micro_batches) if card else None
    if card is None or card.bf16_tflops is None or seconds is None:
        return plan
    if stages.of(plan.stage).has_reference:
        if isinstance(
            section, Kto
        ):  # both replies that a prompt is read with, and one of them again in each step
            tokens = round(tokens * (2 + epochs))
        flops = tokens * terms.forward_flops_per_token(recipe.model.architecture)
        seconds += flops / (card.bf16_tflops * 1e12)
    return replace(plan, floor_seconds=seconds)


def _part_of(rows: DataReport, processes: int) -> DataReport:
    """The rows that one of the processes trains on."""

    def part(number: int | None) -> int | None:
        return None if number is None else math.ceil(number / processes)

    return replace(
        rows,
        used=part(rows.used),
        tokens_per_epoch=part(rows.tokens_per_epoch),
        prompt_tokens_per_epoch=part(rows.prompt_tokens_per_epoch),
    )


def _across(plan: Plan, recipe: Recipe, processes: int, gradient_bytes: float) -> Plan:
    """The plan of all of them, of one of them on its part of the batch."""
    per_1000, steps = plan.floor_seconds_per_1000_steps, recipe.section(plan.stage).max_steps
    sharing = Sharing.of(gradient_bytes, processes, None if per_1000 is None else per_1000 / 1000)
    spent, of_run = sharing.seconds["pcie4"], plan.floor_seconds
    if of_run is not None and per_1000:
        of_run += spent * (steps or of_run / (per_1000 / 1000))
    return replace(
        plan,
        processes=processes,
        sharing=sharing,
        tokens_per_step=plan.tokens_per_step * processes,
        tokens_of_run=plan.tokens_of_run and plan.tokens_of_run * processes,
        floor_seconds_per_1000_steps=per_1000 and per_1000 + 1000 * spent,
        floor_seconds=of_run,
    )


def _plan(recipe: Recipe, stage: str, card: Card | None, ram_gib: float) -> Plan:
    section, architecture = recipe.section(stage), recipe.model.architecture
    room, phases = _Room.of(recipe, card, ram_gib), Phases(recipe, stage, on_gpu=card is not None)
    settings = Search.of(recipe, stage, phases, room.budget, section.max_length).settings()
    phases_gib: dict[str, float] = {}
    peak, at_peak = 0.0, {}
    for name, items in phases.worst(settings, section.max_length):
        held = sum(items.values())
        phases_gib[name] = max(phases_gib.get(name, 0.0), held / GIB)
        if held > peak:
            peak, at_peak = held, items
    at_peak = at_peak | {"context": room.context, "reserve": room.reserve}
    largest = min(
        largest_max_length(recipe, stage, phases, room.budget),
        architecture.max_position_embeddings or LONGEST,
    )
    tokens = section.effective_batch_size * stages.of(stage).sequences_per_row * section.max_length
    micro_batches, has_head = settings.num_micro_batches(tokens), stages.of(stage).answers
    seconds = _seconds(recipe, stage, card, settings, tokens, micro_batches) if card else None
    if card and seconds is not None and isinstance(section, Rl):
        in_a_row = (
            math.ceil(section.effective_batch_size / section.generated_at_once)
            * section.max_completion_length
        )
        seconds += terms.generation_seconds(architecture, card, recipe.model.load_in_4bit, in_a_row) or 0.0
    return Plan(
        stage=stage,
        card=card.name if card else f"CPU with {ram_gib:.1f} GiB of RAM",
        items_gib={name: at_peak.get(name, 0.0) / GIB for name in ITEMS},
        phases_gib=phases_gib,
        peak_gib=peak / GIB,
        budget_gib=room.budget / GIB,
        fits=peak <= room.budget,
        settings=settings,
        largest_max_length=largest,
        tokens_per_step=tokens,
        flops_per_token=terms.flops_per_token(architecture, settings.recompute_layers, has_head),
        floor_seconds_per_1000_steps=None if seconds is None else 1000 * seconds,
        floor_seconds=None if seconds is None or section.max_steps is None else section.max_steps * seconds,
        tokens_of_run=None,
        fixes=() if peak <= room.budget else _fixes(recipe, stage, card, ram_gib, largest),
        price_per_hour=recipe.memory.price_per_hour,
    )


@dataclass(frozen=True)
class _Room:
    """Bytes of the card (or the RAM): what a run may allocate, the context, and what is kept in reserve."""

    budget: float
    context: float
    reserve: float

    @classmethod
    def of(cls, recipe: Recipe, card: Card | None, ram_gib: float) -> _Room:
        """A pinned budget is respected as far as the card goes."""
        context = terms.CONTEXT_GIB * GIB if card else 0.0
        usable = max(0.0, (card.total_gib if card else ram_gib) * GIB - context)
        auto = max(0.0, usable - terms.RESERVE_GIB * GIB) if card else usable * terms.RAM_SHARE
        pinned = recipe.memory.budget_gib
        budget = auto if pinned == "auto" else min(pinned * GIB, usable)
        return cls(budget, context, usable - budget)


def _seconds(
    recipe: Recipe, stage: str, card: Card, settings: Settings, tokens: int, micro_batches: float
) -> float | None:
    """Floor of training over `tokens` tokens; DPO's reference pass comes on top."""
    return terms.step_seconds(
        recipe.model.architecture,
        card,
        load_in_4bit=recipe.model.load_in_4bit,
        tokens=tokens,
        micro_batches=micro_batches,
        recompute_layers=settings.recompute_layers,
        has_head=stages.of(stage).answers,
    )


def _fixes(recipe: Recipe, stage: str, card: Card | None, ram_gib: float, largest: int) -> tuple[str, ...]:
    """Those that suffice before those that only help, each group cheapest first."""
    enough: list[str] = []
    helpful: list[str] = []
    before, _ = _peak_and_budget(recipe, stage, card, ram_gib)
    solved: set[str] = set()  # keys of which a smaller change is enough already
    for changes in _changes(recipe, stage, card is not None, largest):
        if solved.intersection(path for path, _ in changes):
            continue
        changed = recipe
        for path, value in changes:
            changed = _with(changed, path, value)
        peak, budget = _peak_and_budget(changed, stage, card, ram_gib)
        what = " ".join(f"--set {path}={str(value).lower()}" for path, value in changes)
        if peak <= budget:
            enough.append(f"{what}: {_figure(peak, budget)}")
            solved.update(path for path, _ in changes)
        elif peak < before:
            helpful.append(f"{what}: {_figure(peak, budget)}, not enough alone")
    larger = [item for item in CARDS.items() if card and item[1].total_gib > card.total_gib]
    for key, other in sorted(larger, key=lambda item: item[1].total_gib):
        peak, budget = _peak_and_budget(recipe, stage, other, ram_gib)
        if peak <= budget:
            enough.append(f"a larger card, {key} ({other.total_gib:g} GiB): {_figure(peak, budget)}")
            break
    return tuple((enough + helpful)[:NUM_FIXES])


def _changes(recipe: Recipe, stage: str, on_gpu: bool, largest: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """What can be changed: first what costs nothing, then what costs time, then quality."""
    section, lora, memory = recipe.section(stage), recipe.lora, recipe.memory
    limits = (
        *("per_device_train_batch_size", "tokens_per_micro_batch"),
        *("recompute_layers", "loss_chunk_gib", "budget_gib"),
    )
    if pinned := [name for name in limits if getattr(memory, name) != "auto"]:
        yield tuple((f"memory.{name}", "auto") for name in pinned)
    if on_gpu and "8bit" not in section.optim:
        yield ((f"{stage}.optim", "adamw_8bit"),)
    if isinstance(section, (Dpo, Kto)) and section.precompute_ref_batch_size > 1:
        yield ((f"{stage}.precompute_ref_batch_size", 1),)
    if isinstance(section, Rl):
        yield from _changes_of_rl(section)
    least = 2 if isinstance(section, Kto) else 1
    if (section.eval_datasets or section.eval_rows) and section.per_device_eval_batch_size > least:
        yield ((f"{stage}.per_device_eval_batch_size", least),)
    if not recipe.model.load_in_4bit:
        yield (("model.load_in_4bit", True),)
    if 8 <= largest < section.max_length:
        yield ((f"{stage}.max_length", largest),)
    if lora.r > 8:
        yield (("lora.r", 8),)


def _changes_of_rl(section: Rl) -> Iterator[tuple[tuple[str, Any], ...]]:
    for at, reward in enumerate(section.rewards):
        if reward.model and not reward.load_in_4bit:
            yield ((f"rl.rewards.{at}.load_in_4bit", True),)
    at_once = section.generated_at_once
    while at_once > 1:
        at_once //= 2
        yield (("rl.generation_rows", at_once),)
    if section.max_completion_length > 2 * section.prompt_tokens:
        yield (("rl.max_completion_length", section.max_completion_length // 2),)


def _peak_and_budget(recipe: Recipe, stage: str, card: Card | None, ram_gib: float) -> tuple[float, float]:
    budget, phases = _Room.of(recipe, card, ram_gib).budget, Phases(recipe, stage, on_gpu=card is not None)
    max_length = recipe.section(stage).max_length
    settings = Search.of(recipe, stage, phases, budget, max_length).settings()
    return phases.peak(settings, max_length), budget


def _figure(peak: float, budget: float) -> str:
    return f"predicted peak {peak / GIB:.2f} of {budget / GIB:.2f} GiB"


def _with(section: Any, path: str, value: Any) -> Any:
    """A copy of a recipe section, or of a list of them, with one value changed."""
    name, _, rest = path.partition(".")
    if isinstance(section, tuple):
        at = int(name)
        return (*section[:at], _with(section[at], rest, value), *section[at + 1 :])
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})
