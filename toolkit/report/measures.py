"""What a measure of a model is called and how it is written: the same on both pages, in Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from toolkit.records.comparison_report import AnswerMeasures

SHARE = "{:.1%}"


class Shown(NamedTuple):
    """`style` formats a value. `better` is the sign of an improvement, 0 where neither direction is one."""

    label: str
    style: str = ""  # none: three digits
    better: int = 0

    @property
    def is_share(self) -> bool:
        return self.style == SHARE

    def text(self, value: float) -> str:
        return self.style.format(value) if self.style else three_digits(value)


# By the names of `AnswerMeasures`, in the order of a table. The recipe's own stand behind the first.
OF_ANSWERS = {
    "correct_fraction": Shown("answered correctly", SHARE),
    "preference_accuracy": Shown("prefers the chosen reply", SHARE),
    "mean_implicit_reward": Shown("implicit reward: how far from the reference", "{:+.3f}"),
    "ended_fraction": Shown("ended by itself", SHARE),
    "mean_answer_tokens": Shown("tokens an answer, mean", "{:.1f}"),
    "median_answer_tokens": Shown("tokens an answer, median", "{:.1f}"),
    "mean_answer_characters": Shown("characters an answer, mean", "{:.1f}"),
    "median_answer_characters": Shown("characters an answer, median", "{:.1f}"),
    "empty_fraction": Shown("empty answers", SHARE),
    "distinct_1": Shown("distinct words in an answer", SHARE),
    "distinct_2": Shown("distinct pairs of words", SHARE),
    "distinct_3": Shown("distinct triples of words", SHARE),
    "mean_longest_repeat_words": Shown("longest repeat, words, mean", "{:.1f}"),
    "max_longest_repeat_words": Shown("longest repeat, words, largest", "{:.0f}"),
    "script_drift_fraction": Shown("in another script than the prompt", SHARE),
    "tokens_per_second": Shown("tokens/s", "{:,.0f}"),
}
# By the names of `PairScores`.
OF_SCORES = {
    "accuracy": Shown("held-out accuracy", SHARE, 1),
    "margin": Shown("margin of score", better=1),
    "accuracy_chosen_shorter": Shown("accuracy where chosen is the shorter", SHARE, 1),
    "accuracy_chosen_longer": Shown("accuracy where chosen is the longer", SHARE, 1),
    "length_correlation": Shown("correlation of score and length"),
}
# By the names of `HeldOutMeasures` and `ModelMeasures`.
OF_HELD_OUT = {
    "loss": Shown("held-out loss", better=-1),
    "perplexity": Shown("perplexity", better=-1),
    "preference_accuracy": Shown("accuracy by reward", SHARE, 1),
    "preference_margin": Shown("margin of reward", better=1),
    "preference_log_loss": Shown("log loss by reward", better=-1),
    "likelihood_accuracy": Shown("accuracy by likelihood", SHARE, 1),
    "likelihood_margin": Shown("margin of likelihood", better=1),
    "summed_likelihood_accuracy": Shown("accuracy by likelihood of whole replies", SHARE, 1),
    "summed_likelihood_margin": Shown("margin of likelihood of whole replies", better=1),
    "calibration_error": Shown("calibration error", SHARE, -1),
    "overconfidence": Shown("overconfidence", SHARE),
    "brier_score": Shown("Brier score", better=-1),
}


def answer_rows(models: Mapping[str, AnswerMeasures]) -> list[tuple[str, list[str]]]:
    """(label, one formatted value a model) of every measure that some model has."""
    found = [(how, [getattr(of, name) for of in models.values()]) for name, how in OF_ANSWERS.items()]
    matches = [of.matches or {} for of in models.values()]
    own = dict.fromkeys(name for shares in matches for name in shares)
    found[1:1] = [(Shown(name, SHARE), [shares.get(name) for shares in matches]) for name in own]
    return [
        (how.label, ["-" if value is None else how.text(value) for value in values])
        for how, values in found
        if any(value is not None for value in values)
    ]


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
