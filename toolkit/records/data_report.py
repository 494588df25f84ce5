"""data_report.json: what became of every row, of training and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.records.record import Record


@dataclass(frozen=True)
class SelectionStep(Record):
    """Rows before and after one step of the selection."""

    step: str
    before: int
    after: int


@dataclass(frozen=True)
class Rows(Record):
    """One side of the split. `dropped` counts rows by reason, `first_rows` are the lowest of each reason.

    `tokens_per_epoch` are of all sequences, the prompt of a pair twice; `lengths` are tokens a row, percentiles of each
    kind of length; `cut_fraction` is of the used rows.
    """

    read: int | None
    used: int | None
    dropped: dict[str, int] | None
    first_rows: dict[str, list[int | str]] | None
    cut: int | None
    cut_fraction: float | None
    tokens_per_epoch: int | None
    trained_tokens_per_epoch: int | None
    prompt_tokens_per_epoch: int | None
    lengths: dict[str, dict[str, int]] | None
    selection: list[SelectionStep] | None


@dataclass(frozen=True)
class HeldOut(Rows):
    """`leaks`: rows that also stood in training and were taken out."""

    leaks: int | None


@dataclass(frozen=True)
class DataReport(Rows):
    """The rows of training; `eval` those held out, where there are any."""

    max_length: int | None
    suggestion: str | None
    eval: HeldOut | None = None
