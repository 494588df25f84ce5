"""Held-out rows under base, SFT and DPO: one base in memory, adapters switched on it, log-probs of every row."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from toolkit.compare.candidates import BASE
from toolkit.console.screen import bar
from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.base import model, oom
from toolkit.engine.data import preparation
from toolkit.engine.inference import log_probs
from toolkit.errors import UserError
from toolkit.evaluation import measures
from toolkit.evaluation.intervals import Floats
from toolkit.evaluation.measures import Rows
from toolkit.evaluation.scope import MODELS, Scope
from toolkit.evaluation.table import show_evaluation
from toolkit.recipe import stages
from toolkit.recipe.schema import Dpo, Recipe
from toolkit.recipe.stages import Stage
from toolkit.records.evaluation_report import Evaluation
from toolkit.run.replacing import replacing
from toolkit.run.rundir import EVENTS, RunDir


def run(recipe: Recipe, run: RunDir, scope: Scope, console: Console) -> Evaluation:
    """Measures the models of `scope`, shows and writes the report, and returns it.

    Raises UserError for what the user can fix; an earlier evaluation stays until this one is complete, and is
    moved aside then.
    """
    started = time.perf_counter()
    with replacing(run, console) as folder:
        suite = _suite(scope, console)  # an unknown task is said before the model is loaded
        rewarded = _rewarded(scope.models)
        reference = _reference(recipe, run, rewarded)
        with bar(console, f"loading {recipe.model.path}", None):
            loaded = model.load_trained(recipe, _adapters(run, {*scope.models, reference}))
            loaded.model.eval()
        measuring = _Measuring(recipe, loaded, oom.Recovery(folder / EVENTS, console), console)
        rows = Rows()
        left_out = {
            "loss": measuring.conversations(rows, scope.models),
            "preference": measuring.pairs(rows, scope.models, rewarded, reference),
        }
        notes = [*scope.notes, *measures.without_nan(rows)]
        measured = measures.summary(rows, scope.models, recipe.seed)
        models = dict(measured.models or {})
        for name in scope.models if suite else ():
            title = f"{name}: {', '.join(suite.asked.names)}"
            with bar(console, title, None), model.use_adapter(loaded.model, name):
                try:
                    tasks, chat_template = suite.run(recipe, loaded, name)
                    models[name] = replace(models[name], tasks=tasks, chat_template=chat_template)
                except UserError as error:  # what was measured so far is not lost for it
                    left_out[f"{name}.tasks"] = str(error)
        notes += suite.notes if suite else []
        report = replace(
            measured,
            recipe=recipe.name,
            device=model.device_name(),
            seed=recipe.seed,
            models=models,
            left_out={what: reason for what, reason in left_out.items() if reason},
            notes=notes,
            wall_seconds=time.perf_counter() - started,
        )
        report.write(folder / run.report.name)
    show_evaluation(report, console)
    return report


def _adapters(run: RunDir, names: set[str | None]) -> dict[str, Path]:
    return {name: run.of(name).adapter for name in MODELS if name in names and name != BASE}


def _suite(scope: Scope, console: Console) -> Any:
    if scope.tasks is None:
        return None
    with bar(console, f"fetching the rows of {', '.join(scope.tasks.names)}", None):
        from toolkit.engine.inference import benchmarks  # an optional package, and seconds of import

        return benchmarks.load(scope.tasks)


def _rewarded(models: tuple[str, ...]) -> Stage | None:
    """The last of the models that was trained against a reference."""
    return next((stages.of(name) for name in reversed(models[1:]) if stages.of(name).has_reference), None)


def _reference(recipe: Recipe, run: RunDir, rewarded: Stage | None) -> str | None:
    """The model that `rewarded` was held against; None where it is not needed, or not there any more."""
    if rewarded is None:
        return None
    started_from = recipe.starts_from(rewarded.name)
    if started_from is None:
        return BASE
    return started_from if run.of(started_from).finished_with() is not None else None


class _Measuring:
    """Fills in the numbers of rows, model by model."""

    def __init__(self, recipe: Recipe, loaded: model.LoadedModel, recovery: oom.Recovery, console: Console):
        self.recipe, self.loaded, self.recovery, self.console = recipe, loaded, recovery, console
        self.pad = loaded.tokenizer.pad_token_id

    def conversations(self, rows: Rows, models: tuple[str, ...]) -> str | None:
        """Losses on the held-out conversations; returns why not, where there are none."""
        stage = stages.of_kind("chat")
        held_out = self._held_out(stage)
        if held_out is None:
            return self._no_rows(stage)
        sequences = [log_probs.Scored(row["input_ids"], row["labels"]) for row in held_out]
        rows.sources = held_out["source"][:]
        # the first token is predicted from nothing
        rows.num_tokens = np.array(
            [len(s.labels[1:]) - s.labels[1:].count(IGNORE_INDEX) for s in sequences], float
        )
        for name in models:
            with (
                bar(self.console, f"{name}: {len(sequences):,} held-out rows", len(sequences)) as advance,
                model.use_adapter(self.loaded.model, name),
            ):
                sums = log_probs.sums(self.loaded.model, sequences, self.pad, advance, self.recovery)
            rows.losses[name] = -sums.double().numpy()
        return None

    def pairs(
        self, rows: Rows, models: tuple[str, ...], rewarded: Stage | None, reference: str | None
    ) -> str | None:
        """Log-probs of the held-out pairs, of the reference too; returns why not all of it could be had."""
        stage = stages.of_kind("pair")
        held_out = self._held_out(stage)
        if held_out is None:
            return self._no_rows(stage)
        pairs = preparation.as_pairs(held_out)
        rows.pair_sources = held_out["source"][:]
        rows.chosen_tokens = np.array([len(pair.chosen_ids) for pair in pairs], float)
        rows.rejected_tokens = np.array([len(pair.rejected_ids) for pair in pairs], float)
        measured: dict[str, tuple[Floats, Floats]] = {}
        needed = {*models, reference}
        if self.recipe.dpo and self.recipe.dpo.share_prompts:
            log_probs.share_prompts(self.loaded.model, pairs, self.pad, self.console)
        for name in (name for name in MODELS if name in needed):
            with (
                bar(self.console, f"{name}: {len(pairs):,} held-out pairs", 2 * len(pairs)) as advance,
                model.use_adapter(self.loaded.model, name),
            ):
                both = log_probs.pairs(self.loaded.model, pairs, self.pad, advance, self.recovery)
            measured[name] = both[0].double().numpy(), both[1].double().numpy()
        rows.chosen = {name: measured[name][0] for name in models}
        rows.rejected = {name: measured[name][1] for name in models}
        if rewarded is None:
            return None
        if reference is None:
            started_from = str(self.recipe.starts_from(rewarded.name))
            return (
                f"{rewarded.name}'s reference, the {started_from.upper()} adapter, is not in {self.recipe.name}'s "
                f"runs: implicit rewards need it; run `python run_{started_from}.py --recipe {self.recipe.name}`"
            )
        section = self.recipe.section(rewarded.name)
        assert isinstance(section, Dpo)
        rows.rewarded, rows.beta, rows.loss = rewarded.name, section.beta, section.loss_type
        rows.reference = rows.gap(*measured[reference])
        return None

    def _held_out(self, stage: Stage) -> Dataset | None:
        section = getattr(self.recipe, stage.name)
        return preparation.held_out(self.recipe, section, stage.row_kind, self.loaded)

    def _no_rows(self, stage: Stage) -> str:
        name = stage.name
        if stage not in self.recipe.stages():
            return f"recipe {self.recipe.name} has no {name} stage, so no held-out rows of one"
        section = self.recipe.section(name)
        if not (section.eval_datasets or section.eval_rows):
            return f"{name} holds no rows out: name some in {name}.eval_datasets, or set {name}.eval_rows"
        return f"none of the rows that {name} holds out can be used: see data_report.json of the {name} run"
