"""What can be said of answers by their text alone: length, repetition, drift of script, a recipe's own expressions.

Pure; no model, no network.
"""

from __future__ import annotations

import re
import signal
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

# Japanese mixes these in one sentence, so a change between them is no drift. Chinese and Japanese look alike here.
_HAN_AND_KANA = {"CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC"}
_NO_SCRIPT = {"MODIFIER", "COMBINING", "MATHEMATICAL"}
LONGEST_SEARCH_SECONDS = 10.0  # a nested quantifier can take years, and the answers are not yet on disk


def measures(prompts: Sequence[str], answers: Sequence[str], num_tokens: Sequence[int]) -> dict[str, Any]:
    """Fields of `AnswerMeasures` that the texts of one model's answers tell. `prompts` are what they answer, one each.

    A value is None where no answer has what it is measured on.
    """
    words = [answer.split() for answer in answers]
    drifts = [
        drift
        for prompt, answer in zip(prompts, answers, strict=True)
        if (drift := script_drifts(prompt, answer)) is not None
    ]
    repeated = [longest_repeated_span(answer) for answer in words]
    return {
        "mean_answer_tokens": _mean(num_tokens),
        "median_answer_tokens": statistics.median(num_tokens) if num_tokens else None,
        "mean_answer_characters": _mean([len(answer) for answer in answers]),
        "median_answer_characters": statistics.median(map(len, answers)) if answers else None,
        "empty_fraction": _mean([not answer for answer in words]),
        **{
            f"distinct_{n}": _mean([value for answer in words if (value := distinct(answer, n)) is not None])
            for n in (1, 2, 3)
        },
        "mean_longest_repeat_words": _mean(repeated),
        "max_longest_repeat_words": max(repeated, default=None),
        "script_drift_fraction": _mean(drifts),
    }


def matches(
    expressions: Mapping[str, str], answers: Sequence[str], longest_seconds: float = LONGEST_SEARCH_SECONDS
) -> dict[str, float | None]:
    """Name -> share of the answers in which its regular expression is found.

    None without answers, and where one expression takes longer than `longest_seconds` over all of them.
    """
    found: dict[str, float | None] = {}
    for name, expression in expressions.items():
        try:
            with _limited(longest_seconds):
                found[name] = _mean([re.search(expression, answer) is not None for answer in answers])
        except TimeoutError:
            found[name] = None
    return found


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after that long. Python's `re` has no limit, but it looks for signals."""

    def expire(*_: object) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def distinct(words: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of one answer, in (0, 1]; None for fewer than n words.

    Li et al. 2016, "A Diversity-Promoting Objective Function", section 4.3, there over a whole corpus. Here it is
    within an answer, so that it neither falls with the number of answers nor asks them to differ from one another.
    """
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def longest_repeated_span(words: Sequence[str]) -> int:
    """Words in the longest run that occurs twice or more, overlaps included: "a b a b a" has "a b a", 3 words.

    If a run of k words repeats, so does one of k - 1: bisection over k.
    """
    low, high = 0, max(len(words) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        grams = [tuple(words[start : start + middle]) for start in range(len(words) - middle + 1)]
        if len(set(grams)) < len(grams):
            low = middle
        else:
            high = middle - 1
    return low


def script(text: str) -> str | None:
    """The script that most letters of the text belong to (LATIN, CYRILLIC, ARABIC, ...); None without letters.

    It is the first word of the letters' Unicode names, after compatibility forms are undone; Han and kana are one,
    HAN. A script is not a language: English and French are both LATIN.
    """
    counts: Counter[str] = Counter()
    for letter in unicodedata.normalize("NFKC", text):
        if letter.isalpha():
            name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
            if name and name not in _NO_SCRIPT:
                counts["HAN" if name in _HAN_AND_KANA else name] += 1
    return max(counts, key=lambda name: (counts[name], name)) if counts else None


def script_drifts(prompt: str, answer: str) -> bool | None:
    """Whether an answer is mostly in another script than its prompt; None when either has no letters."""
    asked, answered = script(prompt), script(answer)
    return None if asked is None or answered is None else asked != answered


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
