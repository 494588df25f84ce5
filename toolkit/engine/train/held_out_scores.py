"""How a reward model scores the pairs that it was not trained on. Asked when the run is safe, as answers are."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from rich.markup import escape

from toolkit.console.screen import bar
from toolkit.engine.base import model, oom
from toolkit.engine.data import preparation
from toolkit.engine.inference import scores
from toolkit.errors import Interrupted, UserError
from toolkit.evaluation import pair_scores
from toolkit.evaluation.table import score_lines
from toolkit.records.run_report import PairScores
from toolkit.training.job import Job


def measure(job: Job, loaded: model.LoadedModel, recovery: oom.Recovery) -> PairScores:
    """Shows and returns what report.json says of it; in `note` why there is nothing: the adapter is already saved."""
    started, found = time.perf_counter(), PairScores.unknown()
    try:
        found = _measured(job, loaded, recovery)
        for line in score_lines(found):
            job.console.print(line, soft_wrap=True)
    except (Interrupted, KeyboardInterrupt):
        found = replace(found, note="a signal asked the run to end")
    except UserError as error:
        found = replace(found, note=error.problems[0])
    if found.note:
        job.console.print(
            f"[yellow]no scores of held-out pairs: {escape(found.note)}; the adapter is saved[/]"
        )
    return replace(found, seconds=time.perf_counter() - started)


def _measured(job: Job, loaded: model.LoadedModel, recovery: oom.Recovery) -> PairScores:
    stage = job.stage
    rows = preparation.held_out(job.recipe, job.section, stage.row_kind, loaded)
    if rows is None:
        raise UserError(
            f"{stage.name} holds none out: name some in {stage.name}.eval_datasets, or set eval_rows"
        )
    pairs = preparation.as_pairs(rows)
    sequences = [pair.prompt_ids + reply for pair in pairs for reply in (pair.chosen_ids, pair.rejected_ids)]
    title = f"{stage.name}: scores of {len(pairs):,} held-out pairs"
    with bar(job.console, title, len(sequences)) as advance:
        found = scores.of_tokens(loaded.model, sequences, advance, recovery).double().numpy()
    if not np.isfinite(found).all():
        raise UserError("some are NaN or infinite; train it again with a lower learning_rate")
    scored = pair_scores.Scored(
        chosen=found[0::2],
        rejected=found[1::2],
        chosen_tokens=np.array([len(pair.chosen_ids) for pair in pairs], float),
        rejected_tokens=np.array([len(pair.rejected_ids) for pair in pairs], float),
        sources=rows["source"][:],
    )
    return pair_scores.summary(scored, job.recipe.seed)
