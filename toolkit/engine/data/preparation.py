"""Rows of a recipe's sets -> tokenised, masked, cut datasets, with every row accounted for.

`reading` makes a pool of rows, `selection` decides which are used and in which order, `masking` makes tokens of
them, `accounting` says what became of each, `cache` keeps the result.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value
from rich.console import Console
from rich.markup import escape

from toolkit import env
from toolkit.console.screen import bar
from toolkit.data.accounting import Accounting
from toolkit.data.masking import (
    Masking,
    Tokenized,
    TokenizedChat,
    TokenizedLabelled,
    TokenizedPair,
    TokenizedPrompt,
)
from toolkit.data.reasons import Reason
from toolkit.data.selection import LEAKS, Selection, Step
from toolkit.engine.base.model import LoadedModel
from toolkit.engine.data import cache
from toolkit.engine.data.reading import UNREAD, Pool, load_item, places_of, read_sets
from toolkit.errors import UserError
from toolkit.recipe.schema import AnswersSection, Recipe, Rl, StageSection
from toolkit.recipe.stages import RowKind
from toolkit.records.data_report import DataReport, HeldOut, SelectionStep

IDS: dict[RowKind, list[str]] = {
    "chat": ["input_ids", "labels"],
    "pair": ["prompt_ids", "chosen_ids", "rejected_ids"],
    "labelled": ["prompt_ids", "completion_ids"],
    "prompt": ["prompt_ids"],
}
LABEL = "label"  # TRL's name for whether a reply is a good one
TEXTS: dict[RowKind, list[str]] = {
    "chat": [],
    "pair": [],
    "labelled": [],
    "prompt": ["prompt", "answers"],
}  # JSON
BATCH = 1000  # rows that are tokenised at once


@dataclass
class Side:
    """One side of the split as it lies on disk (train or eval), and how it came to its rows."""

    rows: Dataset | None
    accounting: Accounting
    steps: list[Step]

    def told(self) -> dict[str, Any]:
        """Fields of `records.data_report.Rows`."""
        return self.accounting.to_dict() | {"selection": [SelectionStep(*step) for step in self.steps]}


@dataclass
class Prepared:
    """The columns of `columns_of`, and `length`."""

    train: Dataset
    eval: Dataset | None
    report: DataReport


def prepare(
    recipe: Recipe, section: StageSection, kind: RowKind, loaded: LoadedModel, console: Console
) -> Prepared:
    """Both sides of a section's rows, tokenised; from the cache where nothing that decides them has changed.

    Shows and returns the account of every row. Raises UserError for sets that cannot be reached or read, or when
    too few of their rows can be used.
    """
    with bar(console, f"preparing the {kind} rows", None):
        sides = _sides(recipe, section, kind, masking_of(section, loaded))
    train, held_out = sides["train"], sides.get("eval")
    _show_steps(train.steps, console)
    longest = None if kind == "prompt" else section.max_length  # completions come on top
    for shown in train.accounting.shown(longest):
        console.print(shown)
    train.accounting.check(section.max_dropped_fraction)
    suggestion = train.accounting.suggestion(longest)
    report = DataReport(
        **train.told(),
        max_length=section.max_length,
        suggestion=suggestion,
        eval=HeldOut(**held_out.told(), leaks=_check_held_out(held_out, console)) if held_out else None,
    )
    columns = [*columns_of(kind), "length"]
    assert train.rows is not None, "the check of the account passed"
    return Prepared(
        train.rows.select_columns(columns),
        held_out.rows.select_columns(columns) if held_out and held_out.rows is not None else None,
        report,
    )


def columns_of(kind: RowKind) -> list[str]:
    """Those that a trainer reads: token ids, the label of a labelled reply, the texts of a prompt."""
    return [*IDS[kind], *([LABEL] if kind == "labelled" else []), *TEXTS[kind]]


def held_out(
    recipe: Recipe, section: StageSection | None, kind: RowKind, loaded: LoadedModel
) -> Dataset | None:
    """The rows that a stage holds out, as it prepared them, with `source`; None when there are none.

    `source` is the row's own column of that name, or the path of its set.
    """
    if section is None or not (section.eval_datasets or section.eval_rows):
        return None
    return _sides(recipe, section, kind, masking_of(section, loaded))["eval"].rows


def as_pairs(rows: Iterable[dict[str, Any]]) -> list[TokenizedPair]:
    """Prepared rows as pairs."""
    return [TokenizedPair(*(row[column] for column in (*IDS["pair"], "cut"))) for row in rows]


def select(
    recipe: Recipe, section: StageSection, kind: RowKind, folder: Path
) -> dict[str, tuple[Pool, Selection]]:
    """Which rows each side takes, in the order of use: train, and eval where the recipe holds rows out."""
    pool, chosen = read_sets(recipe, section, kind, section.datasets, folder / "train")
    if section.deduplicate and len(section.datasets) > 1:
        chosen = chosen.distinct(pool.keys)
    train = (chosen.first(section.max_rows) if section.max_rows else chosen).shuffled(recipe.seed)
    if section.eval_datasets:
        other, held_out = read_sets(recipe, section, kind, section.eval_datasets, folder / "eval")
        held_out = held_out.without(other.keys, {pool.keys[row] for row in train.rows})
        return {"train": (pool, train), "eval": (other, held_out)}
    if section.eval_rows:
        train, held_out = train.hold_out(section.eval_rows, pool.prompts, recipe.seed)
        return {"train": (pool, train), "eval": (pool, held_out)}
    return {"train": (pool, train)}


def masking_of(section: StageSection, loaded: LoadedModel) -> Masking:
    """How a section's rows become tokens."""
    backend = loaded.tokenizer.backend_tokenizer
    longest = section.prompt_tokens if isinstance(section, Rl) else section.max_length
    overlong = section.overlong if isinstance(section, AnswersSection) else "drop"
    return Masking(backend, loaded.template, loaded.end_of_turn, longest, overlong)


def _show_steps(steps: list[Step], console: Console) -> None:
    for what, before, after in steps:
        if what.startswith(UNREAD):
            console.print(f"[yellow]{escape(what)}[/]")
        if before != after:
            console.print(f"[dim]{escape(what)}: {before:,} -> {after:,} rows[/]")


def _check_held_out(side: Side, console: Console) -> int:
    """How many held-out rows also stood in training; shows what is left of them."""
    account, leaks = (
        side.accounting,
        sum(step.before - step.after for step in side.steps if step.what == LEAKS),
    )
    if leaks:
        console.print(f"[yellow]{leaks:,} held-out rows also stand in training and were taken out[/]")
    if not account.used:
        raise UserError("No held-out row can be used.", *account.reasons_as_text())
    console.print(f"[dim]{account.used:,} of {account.read:,} held-out rows used[/]")
    return leaks


# Encoding and keeping ------------------------------------------------------------------------------------------


def _sides(recipe: Recipe, section: StageSection, kind: RowKind, masking: Masking) -> dict[str, Side]:
    def build(folder: Path) -> dict[str, Any]:
        facts = {}
        selected = select(recipe, section, kind, folder / "read")
        unchanged.check()
        for side, (pool, selection) in selected.items():
            accounting = encode(masking, kind, pool, selection, folder / side)
            facts[side] = {"accounting": accounting.state(), "steps": selection.steps}
        shutil.rmtree(folder / "read")
        return facts

    unchanged = cache.Unchanged(recipe, section)
    key = cache.key_of_rows(recipe, section, kind, masking)
    entry = cache.load(key) or cache.make(key, build)
    return {
        side: Side(
            entry.rows(side),
            Accounting.from_state(recorded["accounting"]),
            [Step(*step) for step in recorded["steps"]],
        )
        for side, recorded in entry.facts.items()
    }


def encode(masking: Masking, kind: RowKind, pool: Pool, selection: Selection, folder: Path) -> Accounting:
    """Tokenises the selected rows into an Arrow file in `folder`, in their order; returns what became of each.

    In this process alone: the tokenizer's own threads take the larger part of the work, and no worker is left behind
    by a kill or has to be told of a signal.
    """
    folder.mkdir(parents=True)
    accounts: list[Accounting] = []

    def encode_batch(batch: pyarrow.Table) -> pyarrow.Table:
        items: Any = [load_item(text) for text in batch["item"].to_pylist()]
        with env.tokenizer_threads():
            results = masking.tokenize(kind, items)
        sets = batch["set"].to_pylist()
        accounts.append(Accounting.of(results, places_of(pool.sets, sets, batch["row"].to_pylist())))
        sources = [
            own or pool.sets[which] for own, which in zip(batch["source"].to_pylist(), sets, strict=True)
        ]
        return _table(kind, results, sources)

    if selection.rows:
        pool.rows.select(selection.rows).with_format("arrow").map(
            encode_batch,
            batched=True,
            batch_size=BATCH,
            remove_columns=pool.rows.column_names,
            features=_features(kind),
            cache_file_name=str(folder / "rows.arrow"),
            load_from_cache_file=False,
            new_fingerprint="0" * 16,  # else the whole tokenizer is hashed
        )
    return sum(accounts, Accounting())


def _features(kind: RowKind) -> Features:
    ids = {column: List(Value("int32")) for column in IDS[kind]}
    texts = {column: Value("string") for column in TEXTS[kind]}
    label = {LABEL: Value("bool")} if kind == "labelled" else {}
    return Features(
        {**ids, **label, **texts, "length": Value("int32"), "cut": Value("bool"), "source": Value("string")}
    )


def _table(kind: RowKind, results: Sequence[Any], sources: list[str]) -> pyarrow.Table:
    """The rows that are used, without those of which only the reason is left."""
    used = [
        (*_columns(result), source)
        for result, source in zip(results, sources, strict=True)
        if not isinstance(result, Reason)
    ]
    schema = _features(kind).arrow_schema
    columns = zip(*used, strict=True) if used else [()] * len(schema)
    return pyarrow.Table.from_arrays(
        [_array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
    )


def _array(values: tuple[Any, ...], kind: pyarrow.DataType) -> pyarrow.Array:
    """An Arrow column; lists of ids by way of numpy, five times as fast as pyarrow alone."""
    if not pyarrow.types.is_list(kind):
        return pyarrow.array(values, kind)
    ids = np.fromiter(itertools.chain.from_iterable(values), np.int32)
    offsets = np.fromiter(itertools.accumulate(map(len, values), initial=0), np.int32)
    return pyarrow.ListArray.from_arrays(offsets, ids, type=kind)


def _columns(result: Tokenized) -> tuple[Any, ...]:
    """Values of the columns that `_features` names, but the last."""
    if isinstance(result, TokenizedPrompt):
        return *result, len(result.prompt_ids), False
    if isinstance(result, TokenizedChat):
        return result.input_ids, result.labels, len(result.input_ids), result.cut
    if isinstance(result, TokenizedLabelled):
        prompt, completion, label, cut = result
        return prompt, completion, label, len(prompt) + len(completion), cut
    prompt, chosen, rejected, cut = result
    return prompt, chosen, rejected, len(prompt) + max(len(chosen), len(rejected)), cut
