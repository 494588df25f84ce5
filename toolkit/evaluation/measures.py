"""Numbers of each held-out row -> measures with error bars, differences between stages, and what each source shows.

Pure: `engine/evaluate.py` measures the rows, this says what they amount to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.evaluation import calibration
from toolkit.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES, Floats, PerRow, Resampled
from toolkit.recipe.dpo_losses import LOSSES, DpoLoss
from toolkit.records.evaluation_report import (
    CalibrationError,
    Evaluation,
    HeldOutMeasures,
    Measure,
    ModelMeasures,
    PairedMeasure,
    ReliabilityBin,
)

MAX_SOURCES = (
    20  # shown apart; the rest together, else a set that names a page for every row fills the report
)
OTHER = "(other sources)"


@dataclass(frozen=True)
class Rewarded:
    """What tells a model's implicit rewards: `reference` is the `gap` of what it was trained against, by `loss` (None:
    KTO's, of whole replies, whose margins are no log-odds)."""

    reference: Floats
    beta: float
    loss: DpoLoss | None = "sigmoid"


@dataclass
class Rows:
    """What was measured row by row, by model; arrays of shape (rows,) in the order of the held-out rows.

    `losses` are -log pi summed over the trained tokens of a conversation, `num_tokens` how many those are. `chosen`
    and `rejected` are log pi of a whole reply. `rewarded` has the models that were trained against a reference which is
    there.
    """

    losses: dict[str, Floats] = field(default_factory=dict)
    num_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    sources: list[str] = field(default_factory=list)
    chosen: dict[str, Floats] = field(default_factory=dict)
    rejected: dict[str, Floats] = field(default_factory=dict)
    chosen_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    rejected_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    pair_sources: list[str] = field(default_factory=list)
    rewarded: dict[str, Rewarded] = field(default_factory=dict)

    def gap(self, chosen: Floats, rejected: Floats, loss: DpoLoss | None) -> Floats:
        """Log-probs of the chosen replies less those of the rejected, a token where the loss takes them so."""
        if loss and LOSSES[loss].per_token:
            return chosen / self.chosen_tokens - rejected / self.rejected_tokens
        return chosen - rejected

    def margins(self, model: str) -> Floats | None:
        """Implicit reward of chosen less that of rejected: Rafailov et al. (2023), equation 7. Of `rewarded` only."""
        told = self.rewarded.get(model)
        if told is None or model not in self.chosen:
            return None
        return told.beta * (self.gap(self.chosen[model], self.rejected[model], told.loss) - told.reference)

    def log_odds(self, model: str) -> Floats | None:
        """The margins, where they say how probable it is that chosen is preferred."""
        told = self.rewarded.get(model)
        return self.margins(model) if told and told.loss and LOSSES[told.loss].log_odds else None

    def conversations(self, model: str) -> dict[str, PerRow]:
        """Measures over the held-out conversations, in nats."""
        return {"loss": PerRow(self.losses[model], self.num_tokens)} if model in self.losses else {}

    def pairs(self, model: str) -> dict[str, PerRow]:
        """Measures over the held-out pairs: reward against the reference, log-likelihood per token, and summed."""
        if model not in self.chosen:
            return {}
        margins, measures = self.margins(model), {}
        if margins is not None:
            measures = {
                "preference_accuracy": PerRow.fraction(margins > 0),
                "preference_margin": PerRow.mean(margins),
            }
        if (log_odds := self.log_odds(model)) is not None:
            measures |= calibration.per_row(log_odds)
        chosen, rejected = self.chosen[model], self.rejected[model]
        per_token = chosen / self.chosen_tokens - rejected / self.rejected_tokens
        return measures | {
            "likelihood_accuracy": PerRow.fraction(per_token > 0),
            "likelihood_margin": PerRow.mean(per_token),
            "summed_likelihood_accuracy": PerRow.fraction(chosen > rejected),
            "summed_likelihood_margin": PerRow.mean(chosen - rejected),
        }


def without_nan(rows: Rows) -> list[str]:
    """Takes out models whose numbers are not finite, and says so: `nan > 0` would count as a wrong answer."""
    notes = []
    for what, columns in (
        ("conversations", [rows.losses]),
        ("pairs", [rows.chosen, rows.rejected]),
    ):
        for model in list(columns[0]):
            bad = ~np.logical_and.reduce([np.isfinite(column[model]) for column in columns])
            if bad.any():
                for column in columns:
                    del column[model]
                notes.append(
                    f"{model}: the log-probs of {bad.sum()} of {len(bad)} held-out {what} are NaN or infinite, so "
                    f"nothing is said of {model} there; its weights are damaged: train it again with a lower "
                    "learning_rate"
                )
    for model, told in list(rows.rewarded.items()):
        if not np.isfinite(told.reference).all():
            del rows.rewarded[model]
            notes.append(
                f"the log-probs of {model}'s reference are not all finite: no implicit reward can be told"
            )
    return notes


def summary(rows: Rows, models: Sequence[str], seed: int) -> Evaluation:
    """What the rows tell: every model's measures, each model paired with the one before it, and how they were made."""
    measured: dict[str, dict[str, Any]] = {model: {} for model in models}
    paired: dict[str, dict[str, PairedMeasure]] = {f"{one}_vs_{other}": {} for other, one in pairwise(models)}
    by_source: dict[str, dict[str, dict[str, Measure]]] = {model: {} for model in models}
    for per_row, sources in (
        ({model: rows.conversations(model) for model in models}, rows.sources),
        ({model: rows.pairs(model) for model in models}, rows.pair_sources),
    ):
        together = _together(per_row, seed)
        for model in models:
            measured[model] |= _intervals(together, model, per_row[model])
        for other, one in pairwise(models):
            shared = [name for name in per_row[one] if name in per_row[other]]
            paired[f"{one}_vs_{other}"] |= {
                name: PairedMeasure(*together.difference((one, name), (other, name))) for name in shared
            }
        for source, chosen in of_each(sources).items():
            of_source = _together(per_row, seed, chosen)
            for model in models:
                if per_row[model]:
                    found = by_source[model].setdefault(source, {})
                    found |= _intervals(of_source, model, per_row[model])
    for model in models:
        if by_source[model]:
            found_by_source = {name: HeldOutMeasures(**found) for name, found in by_source[model].items()}
            measured[model]["by_source"] = found_by_source
        if (margins := rows.log_odds(model)) is not None:
            error = calibration.calibration_error(margins, seed)
            measured[model]["calibration_error"] = CalibrationError(**error)  # type: ignore[arg-type]
            measured[model]["reliability"] = [
                ReliabilityBin(**one) for one in calibration.reliability(margins)
            ]
    return replace(
        Evaluation.unknown(),
        confidence=CONFIDENCE,
        num_resamples=NUM_RESAMPLES,
        models={model: ModelMeasures(**measured[model]) for model in models},
        paired=paired,
    )


def _together(
    per_row: dict[str, dict[str, PerRow]], seed: int, chosen: NDArray[np.bool_] | None = None
) -> Resampled:
    """All measures of all models over the same rows, or over those of one source."""
    return Resampled(
        {
            (model, name): rows if chosen is None else rows.where(chosen)
            for model, measures in per_row.items()
            for name, rows in measures.items()
        },
        seed,
    )


def _intervals(resampled: Resampled, model: str, names: Iterable[str]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for name in names:
        value, low, high, num_rows = resampled.interval((model, name))
        found[name] = Measure(value, low, high, num_rows)
        if name == "loss":
            value, low, high = (float(np.exp(nats)) for nats in (value, low, high))
            found["perplexity"] = Measure(value, low, high, num_rows)
    return found


def of_each(sources: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Which rows are of each source, the most frequent first; {} when all are of one."""
    names, counted = np.array(sources), Counter(sources).most_common()
    if len(counted) < 2:
        return {}
    kept = [name for name, _ in counted[: MAX_SOURCES if len(counted) > MAX_SOURCES else None]]
    masks = {name: names == name for name in kept}
    rest = ~np.isin(names, kept)
    return masks | ({OTHER: rest} if rest.any() else {})
