"""Numbers of each held-out row -> measures with error bars, differences between stages, and what each source shows.

Pure: `engine/evaluate.py` measures the rows, this says what they amount to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import calibration
from toolkit.intervals import CONFIDENCE, NUM_RESAMPLES, Floats, PerRow, difference, interval

MAX_SOURCES = (
    20  # shown apart; the rest together, else a set that names a page for every row fills the report
)
OTHER = "(other sources)"


@dataclass
class Rows:
    """What was measured row by row, by model; arrays of shape (rows,) in the order of the held-out rows.

    `losses` are -log pi summed over the trained tokens of a conversation, `num_tokens` how many those are. `chosen`
    and `rejected` are log pi of a whole reply. `reference` is chosen less rejected of DPO's reference, None where it
    is not there.
    """

    losses: dict[str, Floats] = field(default_factory=dict)
    num_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    sources: list[str] = field(default_factory=list)
    chosen: dict[str, Floats] = field(default_factory=dict)
    rejected: dict[str, Floats] = field(default_factory=dict)
    chosen_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    rejected_tokens: Floats = field(default_factory=lambda: np.zeros(0))
    pair_sources: list[str] = field(default_factory=list)
    reference: Floats | None = None
    beta: float | None = None

    def margins(self, model: str) -> Floats | None:
        """Implicit reward of chosen less that of rejected: Rafailov et al. (2023), equation 7. The DPO model's only."""
        if model != "dpo" or model not in self.chosen or self.reference is None or self.beta is None:
            return None
        return self.beta * (self.chosen[model] - self.rejected[model] - self.reference)

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
                **calibration.per_row(margins),
            }
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
    if rows.reference is not None and not np.isfinite(rows.reference).all():
        rows.reference = None
        notes.append("the reference's log-probs are not all finite: no implicit reward can be told")
    return notes


def summary(rows: Rows, models: Sequence[str], seed: int) -> dict[str, Any]:
    """models.<model>.<measure>.{value, low, high, num_rows} and paired.<one>_vs_<other>.<measure>, see README."""
    measured = {model: _measures(rows, model, seed) for model in models}
    return {
        "confidence": CONFIDENCE,
        "num_resamples": NUM_RESAMPLES,
        "models": measured,
        "paired": {
            f"{one}_vs_{other}": _differences(rows, one, other, seed) for other, one in pairwise(models)
        },
    }


def _measures(rows: Rows, model: str, seed: int) -> dict[str, Any]:
    conversations, pairs = rows.conversations(model), rows.pairs(model)
    measures = _intervals(conversations | pairs, seed)
    margins = rows.margins(model)
    if margins is not None:
        measures["calibration_error"] = calibration.calibration_error(margins, seed)
        measures["reliability"] = calibration.reliability(margins)
    by_source: dict[str, Any] = {}
    for per_row, sources in ((conversations, rows.sources), (pairs, rows.pair_sources)):
        for source, chosen in _of_each(sources).items() if per_row else ():
            parts = {name: measure.where(chosen) for name, measure in per_row.items()}
            by_source.setdefault(source, {}).update(_intervals(parts, seed))
    return measures | ({"by_source": by_source} if by_source else {})


def _intervals(measures: dict[str, PerRow], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        found[name] = interval(measure, seed)._asdict()
        if name == "loss":
            found["perplexity"] = {
                key: value if key == "num_rows" else float(np.exp(value))
                for key, value in found[name].items()
            }
    return found


def _differences(rows: Rows, one: str, other: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for of in (rows.conversations, rows.pairs):
        mine, theirs = of(one), of(other)
        found |= {
            name: difference(mine[name], theirs[name], seed)._asdict() for name in mine if name in theirs
        }
    return found


def _of_each(sources: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Which rows are of each source, the most frequent first; {} when all are of one."""
    names, counted = np.array(sources), Counter(sources).most_common()
    if len(counted) < 2:
        return {}
    kept = [name for name, _ in counted[: MAX_SOURCES if len(counted) > MAX_SOURCES else None]]
    masks = {name: names == name for name in kept}
    rest = ~np.isin(names, kept)
    return masks | ({OTHER: rest} if rest.any() else {})
