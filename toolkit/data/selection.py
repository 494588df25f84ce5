"""Which rows of a set are used, in which order, and how many each step left. Pure: works on row numbers.

    chosen = Selection.of(len(rows)).where("score >= 4.0", columns).top(2000, "delta_score", columns)
    chosen = chosen.distinct(keys).first(10_000).shuffled(seed)
    train, held_out = chosen.hold_out(500, prompts, seed)

`columns` and keys are indexed by the row's number in the whole set, from 0. Nothing is evaluated as code.
"""

import hashlib
import json
import math
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from toolkit.errors import UserError

Columns = Mapping[str, Sequence[Any]]

LEAKS = "not in training"  # the step that takes leaks out of a held-out set


class Step(NamedTuple):
    """What a step did, in words, and the rows before and after it."""

    what: str
    before: int
    after: int


class Condition(NamedTuple):
    """`column comparison value`. A missing value (null, NaN, a blank number in a CSV) meets only `== null`."""

    column: str
    comparison: str
    value: int | float | str | bool | None

    def holds(self, value: Any) -> bool:
        """Raises TypeError where value and condition cannot be compared."""
        is_number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if _is_missing(value) or (is_number and value == ""):
            return self.value is None and self.comparison == "=="
        if self.value is None:
            return self.comparison == "!="
        if is_number:
            value = _number(value)
        elif type(value) is not type(self.value):
            raise TypeError
        return bool(_COMPARISONS[self.comparison](value, self.value))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(
    r"""\s*(?P<column>[^\W\d][\w.\-]*)\s*(?P<comparison>==|!=|>=|<=|>|<)\s*
        (?P<value>"[^"]*"|'[^']*'|[^\s"']+)\s*(?P<more>and\b|$)""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"\s*[+-]?\d{1,400}\s*")
_WORDS: dict[str, bool | None] = {"null": None, "true": True, "false": False}


def parse_filter(text: str) -> list[Condition]:
    """`score >= 4.0 and status != "tie"` -> conditions that must all hold.

    A value is a number, a quoted text, true, false or null. Raises UserError for anything else.
    """
    conditions, at = [], 0
    while True:
        match = _CONDITION.match(text, at)
        if match is None:
            raise UserError(
                f"The filter {text!r} is not understood at {text[at:].strip() or 'its end'!r}. "
                f'Write it like: score >= 4.0 and status != "tie" (comparisons: {" ".join(_COMPARISONS)}).'
            )
        value = _literal(match["value"], text)
        if value is None and match["comparison"] not in ("==", "!="):
            raise UserError(f"In the filter {text!r}, null can only be compared with == or !=.")
        conditions.append(Condition(match["column"], match["comparison"], value))
        at = match.end()
        if not match["more"]:
            return conditions


def _literal(word: str, text: str) -> int | float | str | bool | None:
    if word[0] in "\"'":
        return word[1:-1]
    if word in _WORDS:
        return _WORDS[word]
    try:
        return _number(word)
    except TypeError:
        raise UserError(
            f"In the filter {text!r}, {word} is not a number, true, false or null. A text needs quotes."
        ) from None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> int | float:
    """A number, also one written as text in a CSV; integers stay exact. Raises TypeError for anything else."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, int):
        return value
    try:
        return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else float(value)
    except (ValueError, OverflowError):
        raise TypeError from None


@dataclass(frozen=True)
class Selection:
    """Rows by their number in the set, from 0, in the order of use, and the steps that led here."""

    rows: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, num_rows: int) -> Self:
        """All rows of a set, in file order."""
        return cls(tuple(range(num_rows)))

    def where(self, expression: str, columns: Columns) -> Self:
        """The rows that meet a filter. Raises UserError for no such column, or a value of another type."""
        conditions = parse_filter(expression)
        for condition in conditions:
            _require(condition.column, columns, f"The filter {expression!r}")

        def is_met(row: int) -> bool:
            for condition in conditions:
                value = columns[condition.column][row]
                try:
                    if not condition.holds(value):
                        return False
                except TypeError:
                    raise UserError(
                        f"The filter {expression!r} cannot compare the {condition.column} of row {row + 1}, "
                        f"{_short(value)}. Filter on a column of one type."
                    ) from None
            return True

        return self._then(f"filter {expression}", [row for row in self.rows if is_met(row)])

    def top(self, num_rows: int, column: str, columns: Columns) -> Self:
        """The rows with the largest values of a column, in the order they had; of equal ones the earlier.

        Rows without a value are never among them. Raises UserError for no such column or a value that is no number.
        """
        _require(column, columns, f"top_k by {column}")
        values = {}
        for row in self.rows:
            value = columns[column][row]
            if _is_missing(value):
                continue
            try:
                values[row] = _number(value)
            except TypeError:
                raise UserError(
                    f"top_k needs numbers, but the {column} of row {row + 1} is {_short(value)}."
                ) from None
        kept = set(sorted(values, key=lambda row: -values[row])[:num_rows])
        return self._then(f"top {num_rows} by {column}", [row for row in self.rows if row in kept])

    def distinct(self, keys: Sequence[Any]) -> Self:
        """The first row of each key."""
        first: dict[Any, int] = {}
        for row in self.rows:
            first.setdefault(keys[row], row)
        return self._then("deduplicate", first.values())

    def first(self, num_rows: int) -> Self:
        """At most that many rows, from the beginning."""
        return self._then(f"first {num_rows}", self.rows[:num_rows])

    def shuffled(self, seed: int) -> Self:
        """The same rows in an order that the seed alone decides, on every machine and Python."""
        rows = list(self.rows)
        random.Random(seed).shuffle(rows)
        return self._then(f"shuffle with seed {seed}", rows)

    def hold_out(self, num_rows: int, prompts: Sequence[Any], seed: int) -> tuple[Self, Self]:
        """(the rest, `num_rows` rows held out), each in the order they had, with no prompt on both sides.

        `prompts` are keys by row number. Fewer rows are held out where repeated prompts do not add up to
        `num_rows`. Raises UserError where no row would be left on one of the sides.
        """
        groups: dict[Any, list[int]] = {}
        for row in self.rows:
            groups.setdefault(prompts[row], []).append(row)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        held: set[int] = set()
        for group in order:
            if len(held) + len(group) <= num_rows:
                held.update(group)
        if not held or len(held) == len(self.rows):
            raise UserError(
                f"Cannot hold out {num_rows} of {len(self.rows)} rows with {len(groups)} distinct prompts: "
                f"each prompt stays on one side and both sides need a row. Hold out another number."
            )
        what = f"hold out {num_rows} by prompt"
        return (
            self._then(f"{what}: the rest", [row for row in self.rows if row not in held]),
            self._then(what, [row for row in self.rows if row in held]),
        )

    def without(self, keys: Sequence[Any], seen: set[Any]) -> Self:
        """The rows whose key is not among `seen`: an evaluation set without what stands in training."""
        return self._then(LEAKS, [row for row in self.rows if keys[row] not in seen])

    def _then(self, what: str, rows: Any) -> Self:
        kept = tuple(rows)
        return type(self)(kept, (*self.steps, Step(what, len(self.rows), len(kept))))


def mixed(sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[tuple[int, int]]:
    """Several sets in one order, as (set, row of it): evenly, so that any first rows are a fair sample.

    With `weights` each set gives rows, from its beginning, in that proportion, as many as the scarcest allows;
    no row is taken twice. Without them each gives all it has.
    """
    takes = list(sizes)
    if weights is not None:
        most = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        takes = [int(most * weight + 1e-9) for weight in weights]
    spread = [((row + 0.5) / take, which, row) for which, take in enumerate(takes) for row in range(take)]
    return [(which, row) for _, which, row in sorted(spread)]


def key_of(value: Any) -> bytes:
    """16 bytes that stand for any value of strings, numbers, lists and dicts, whatever the order of keys."""
    return key_of_text(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str))


def key_of_text(text: str) -> bytes:
    """16 bytes that stand for a text without lone surrogates, such as JSON in ASCII."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _require(column: str, columns: Columns, who: str) -> None:
    if column not in columns:
        raise UserError(f"{who} names no column of the set. Its columns: {', '.join(sorted(columns))}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
