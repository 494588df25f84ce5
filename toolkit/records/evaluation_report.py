"""eval/report.json: base, SFT and DPO on held-out rows, with error bars."""

from __future__ import annotations

from dataclasses import dataclass, fields

from toolkit.records.record import Record


@dataclass(frozen=True)
class Measure(Record):
    """A measure and its interval; both ends are None, or NaN in memory, where there is no telling."""

    value: float | None
    low: float | None
    high: float | None
    num_rows: int | None


@dataclass(frozen=True)
class CalibrationError(Measure):
    """`calibrated_high` is what 95 % of perfectly calibrated models stay below on as many pairs."""

    calibrated_high: float | None


@dataclass(frozen=True)
class PairedMeasure(Record):
    """One model's measure minus another's on the same rows; `p_value` is two-sided."""

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    num_rows: int | None


@dataclass(frozen=True)
class ReliabilityBin(Record):
    """Pairs of about one confidence: the mean of it, how often the model is right, the margins they span."""

    confidence: float | None
    accuracy: float | None
    margin_low: float | None
    margin_high: float | None
    num_rows: int | None


@dataclass(frozen=True)
class TaskMeasure(Record):
    """One metric of a benchmark, with its standard error."""

    value: float | None
    stderr: float | None
    num_rows: int | None


@dataclass(frozen=True)
class HeldOutMeasures(Record):
    """One model's measures over the same held-out rows, as in docs/evaluation.md. None where it has none."""

    loss: Measure | None = None
    perplexity: Measure | None = None
    preference_accuracy: Measure | None = None
    preference_margin: Measure | None = None
    preference_log_loss: Measure | None = None
    brier_score: Measure | None = None
    overconfidence: Measure | None = None
    likelihood_accuracy: Measure | None = None
    likelihood_margin: Measure | None = None
    summed_likelihood_accuracy: Measure | None = None
    summed_likelihood_margin: Measure | None = None

    def measures(self) -> dict[str, Measure]:
        """Those that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Measure)}


@dataclass(frozen=True)
class ModelMeasures(HeldOutMeasures):
    """All that was measured of one model. `tasks` are metrics by benchmark, asked through the chat template or not."""

    by_source: dict[str, HeldOutMeasures] | None = None
    calibration_error: CalibrationError | None = None
    reliability: list[ReliabilityBin] | None = None
    tasks: dict[str, dict[str, TaskMeasure]] | None = None
    chat_template: bool | None = None


@dataclass(frozen=True)
class Evaluation(Record):
    """`paired` are differences by "<one>_vs_<other>" and measure, `left_out` what was not measured and why."""

    recipe: str | None
    device: str | None
    seed: int | None
    confidence: float | None
    num_resamples: int | None
    models: dict[str, ModelMeasures] | None
    paired: dict[str, dict[str, PairedMeasure]] | None
    left_out: dict[str, str] | None
    notes: list[str] | None
    wall_seconds: float | None
