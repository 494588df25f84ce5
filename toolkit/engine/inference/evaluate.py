"""Held-out rows under base, SFT and DPO: one base in memory, adapters switched on it, log-probs of every row."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console

from toolkit.console.screen import bar
from toolkit.data.masking import IGNORE_INDEX
from toolkit.engine.base import model, oom
from toolkit.engine.data import preparation
from toolkit.engine.inference import log_probs
from toolkit.errors import UserError
from toolkit.evaluation import measures
from toolkit.evaluation.intervals import Floats
from toolkit.evaluation.measures import Rewarded, Rows
from toolkit.evaluation.scope import Scope
from toolkit.evaluation.table import show_evaluation
from toolkit.recipe import stages
from toolkit.recipe.schema import Dpo, Kto, Recipe
from toolkit.recipe.stages import BASE, Stage
from toolkit.records.evaluation_report import Evaluation
from toolkit.run import start
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
        references, gone = _references(recipe, run, scope.models)
        adapters = {
            name: run.adapter_of(name) for name in (*scope.models, *references.values()) if name != BASE
        }
        labels = _labels(adapters)
        with bar(console, f"loading {recipe.model.path}", None):
            loaded = model.load_trained(recipe, {labels[name]: folder for name, folder in adapters.items()})
            loaded.model.eval()
        measuring = _Measuring(recipe, loaded, labels, oom.Recovery(folder / EVENTS, console), console)
        rows = Rows()
        left_out = {
            "loss": measuring.conversations(rows, scope.models),
            "preference": measuring.pairs(rows, run, scope.models, references) or gone,
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


def _labels(names: Iterable[str]) -> dict[str, str]:
    """The name of each adapter beside the others; one that is a path is the reference of some model only."""
    return {
        name: name if stages.is_variant(name) else f"_reference{number}" for number, name in enumerate(names)
    } | {BASE: BASE}


def _suite(scope: Scope, console: Console) -> Any:
    if scope.tasks is None:
        return None
    with bar(console, f"fetching the rows of {', '.join(scope.tasks.names)}", None):
        from toolkit.engine.inference import benchmarks  # an optional package, and seconds of import

        return benchmarks.load(scope.tasks)


def _references(recipe: Recipe, run: RunDir, models: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
    """What each model was trained against that was against something; and which of those are not there any more."""
    rewarded = (name for name in models if name != BASE and stages.of(name).has_reference)
    origins = {name: start.origin(recipe, run.of(name)) for name in rewarded}
    gone = {name: origin for name, origin in origins.items() if not _is_there(run, origin)}
    said = [
        f"{name}'s reference, the adapter of {origin}, is not in {run.adapter_of(origin)}: implicit rewards need it"
        + (f"; run `{run.of(origin).proposed()}`" if stages.is_variant(origin) else "")
        for name, origin in gone.items()
    ]
    return {name: origin for name, origin in origins.items() if name not in gone}, "; ".join(said) or None


def _is_there(run: RunDir, name: str) -> bool:
    if name == BASE:
        return True
    return run.of(name).finished_with() is not None if stages.is_variant(name) else Path(name).is_dir()


class _Measuring:
    """Fills in the numbers of rows, model by model."""

    def __init__(
        self,
        recipe: Recipe,
        loaded: model.LoadedModel,
        labels: dict[str, str],
        recovery: oom.Recovery,
        console: Console,
    ):
        self.recipe, self.loaded, self.recovery, self.console = recipe, loaded, recovery, console
        self.labels = labels
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
                model.use_adapter(self.loaded.model, self.labels[name]),
            ):
                sums = log_probs.sums(self.loaded.model, sequences, self.pad, advance, self.recovery)
            rows.losses[name] = -sums.double().numpy()
        return None

    def pairs(
        self, rows: Rows, run: RunDir, models: tuple[str, ...], references: dict[str, str]
    ) -> str | None:
        """Log-probs of the held-out pairs, of the references too; returns why not, where there are none."""
        stage = stages.of_kind("pair")
        held_out = self._held_out(stage)
        if held_out is None:
            return self._no_rows(stage)
        pairs = preparation.as_pairs(held_out)
        rows.pair_sources = held_out["source"][:]
        rows.chosen_tokens = np.array([len(pair.chosen_ids) for pair in pairs], float)
        rows.rejected_tokens = np.array([len(pair.rejected_ids) for pair in pairs], float)
        measured: dict[str, tuple[Floats, Floats]] = {}
        if self.recipe.dpo and self.recipe.dpo.share_prompts:
            log_probs.share_prompts(self.loaded.model, pairs, self.pad, self.console)
        for name in dict.fromkeys((*models, *references.values())):
            with (
                bar(self.console, f"{name}: {len(pairs):,} held-out pairs", 2 * len(pairs)) as advance,
                model.use_adapter(self.loaded.model, self.labels[name]),
            ):
                both = log_probs.pairs(self.loaded.model, pairs, self.pad, advance, self.recovery)
            measured[name] = both[0].double().numpy(), both[1].double().numpy()
        rows.chosen = {name: measured[name][0] for name in models}
        rows.rejected = {name: measured[name][1] for name in models}
        for name, reference in references.items():
            section = run.of(name).as_trained(self.recipe).section(stages.of(name).name)
            assert isinstance(section, (Dpo, Kto))
            loss = section.loss_type if isinstance(section, Dpo) else None
            rows.rewarded[name] = Rewarded(rows.gap(*measured[reference], loss), section.beta, loss)
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
