"""What became of every row: read, used, dropped for which reason, cut; and how long the used ones are. Pure.

Accountings add up, so each batch of a preparation makes its own: `sum(parts, Accounting())`.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from toolkit.data.masking import Tokenized, TokenizedChat, TokenizedLabelled, TokenizedPrompt
from toolkit.data.reasons import REASONS, Reason
from toolkit.errors import UserError

Place = (
    int | tuple[str, int]
)  # number of a row in its set, from 1; with the set's name where there are several

_KINDS = ("prompt", "answer", "chosen", "rejected", "desirable", "undesirable", "total")
_COUNTS = ("read", "used", "cut", "num_tokens", "num_trained_tokens")
NUM_FIRST_ROWS = 5  # of each reason: enough to go and look
PERCENTILES = (50, 90, 99)


@dataclass
class Accounting:
    """Counts of rows, and lengths in tokens as trained, that is after cutting.

    `first_rows` are the lowest places of each reason in the sets as read. `lengths` counts the used rows by
    length: `prompt`, `answer` and `total` of chats; `prompt`, `chosen`, `rejected` and `total`, the longer of the
    two sequences, of pairs; `prompt`, `desirable` or `undesirable`, and `total` of labelled replies.
    `num_tokens` is what one epoch feeds the model: for a pair, both sequences.
    """

    read: int = 0
    used: int = 0
    cut: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    first_rows: dict[Reason, list[Place]] = field(default_factory=dict)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.used + self.dropped.total() == self.read, "a row was lost without a reason"

    @classmethod
    def of(cls, results: Iterable[Tokenized | Reason], places: Iterable[Place] | None = None) -> "Accounting":
        """The results of one batch, and where their rows stand (else in one set, from 1 on)."""
        read = used = cut = num_tokens = num_trained = 0
        first_rows: dict[Reason, list[Place]] = {}
        dropped: Counter[Reason] = Counter()
        lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for place, result in zip(itertools.count(1) if places is None else places, results, strict=False):
            read += 1
            if isinstance(result, Reason):
                dropped[result] += 1
                first_rows.setdefault(result, []).append(place)
                continue
            used += 1
            cut += result.cut
            sizes, tokens, trained = _sizes(result)
            num_tokens += tokens
            num_trained += trained
            for name, size in sizes.items():
                lengths[name][size] += 1
        lowest = {reason: _lowest(rows) for reason, rows in first_rows.items()}
        return cls(read, used, cut, num_tokens, num_trained, dropped, lowest, dict(lengths))

    def __add__(self, other: "Accounting") -> "Accounting":
        reasons = {*self.first_rows, *other.first_rows}
        kinds = [*self.lengths, *(kind for kind in other.lengths if kind not in self.lengths)]
        return Accounting(
            self.read + other.read,
            self.used + other.used,
            self.cut + other.cut,
            self.num_tokens + other.num_tokens,
            self.num_trained_tokens + other.num_trained_tokens,
            self.dropped + other.dropped,
            {
                reason: _lowest(self.first_rows.get(reason, []) + other.first_rows.get(reason, []))
                for reason in reasons
            },
            {kind: self.lengths.get(kind, Counter()) + other.lengths.get(kind, Counter()) for kind in kinds},
        )

    def kinds(self) -> list[str]:
        """What `lengths` are of, in a fixed order: a class may come first in one set and last in another."""
        return sorted(self.lengths, key=_KINDS.index)

    def percentile(self, kind: str, percent: int) -> int:
        """The smallest length that `percent` percent of the used rows do not exceed; 0 without rows."""
        counts = self.lengths.get(kind, Counter())
        needed, seen = counts.total() * percent / 100, 0
        for length in sorted(counts):
            seen += counts[length]
            if seen >= needed:
                return length
        return 0

    def suggestion(self, max_length: int | None) -> str | None:
        """A smaller max_length, when more than half of it is never used; None when it is, or rows end before it."""
        if max_length is None:
            return None
        longest = self.percentile("total", 100)
        enough = -(-longest // 64) * 64
        if not longest or enough > max_length // 2:
            return None
        return (
            f"No row is longer than {longest} tokens: max_length {enough} holds them all (now {max_length})."
        )

    def check(self, max_dropped_fraction: float) -> None:
        """Raises UserError, with the table, when too many rows are dropped or none is left to train on."""
        if not self.read:
            raise UserError("The set has no rows.")
        share = self.dropped.total() / self.read
        if not self.used or not self.num_trained_tokens:
            problem = f"No row of {self.read:,} can be trained on."
        elif share > max_dropped_fraction:
            problem = (
                f"{self.dropped.total():,} of {self.read:,} rows ({share:.1%}) are dropped, more than "
                f"max_dropped_fraction {max_dropped_fraction:g} allows. Fix the rows or the recipe, or raise it."
            )
        else:
            return
        raise UserError("\n".join([problem, *self.reasons_as_text()]))

    def reasons_as_text(self) -> list[str]:
        """One line a reason, the most frequent first."""
        return [
            f"  {count:>7,}  {reason}: {reason.sentence} (rows {_listed(self.first_rows[reason], count)})"
            for reason, count in self.dropped.most_common()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The counts as data_report.json holds them: fields of `records.data_report.Rows`, all but the selection."""
        return {
            "read": self.read,
            "used": self.used,
            "dropped": {reason.value: count for reason, count in self.dropped.most_common()},
            "first_rows": {
                reason.value: [place if isinstance(place, int) else _name(place) for place in places]
                for reason, _ in self.dropped.most_common()
                for places in [self.first_rows[reason]]
            },
            "cut": self.cut,
            "cut_fraction": self.cut / self.used if self.used else 0.0,
            "tokens_per_epoch": self.num_tokens,
            "trained_tokens_per_epoch": self.num_trained_tokens,
            "prompt_tokens_per_epoch": sum(
                length * n for length, n in self.lengths.get("prompt", {}).items()
            ),
            "lengths": {
                kind: {
                    **{f"p{percent}": self.percentile(kind, percent) for percent in PERCENTILES},
                    "max": self.percentile(kind, 100),
                }
                for kind in self.kinds()
            },
        }

    def state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; `from_state` reads it back."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "dropped": {reason.value: count for reason, count in self.dropped.items()},
            "first_rows": {reason.value: places for reason, places in self.first_rows.items()},
            "lengths": {kind: sorted(counts.items()) for kind, counts in self.lengths.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Accounting":
        """The inverse of `state`. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            **{name: int(state[name]) for name in _COUNTS},
            dropped=Counter({REASONS[name]: count for name, count in state["dropped"].items()}),
            first_rows={
                REASONS[name]: [place if isinstance(place, int) else (place[0], place[1]) for place in places]
                for name, places in state["first_rows"].items()
            },
            lengths={kind: Counter(dict(counts)) for kind, counts in state["lengths"].items()},
        )

    def shown(self, max_length: int | None) -> list[Table | str]:
        """What a terminal shows: the rows, with a line for each reason to drop or cut one, and the lengths."""
        title = f"{self.used:,} of {self.read:,} rows used"
        if not (self.dropped or self.cut):
            return [f"{title}: nothing is dropped or cut", self._lengths(max_length)]
        rows = Table(title=title, title_justify="left")
        rows.add_column("rows", justify="right")
        rows.add_column("dropped because")
        rows.add_column("first rows")
        for reason, count in self.dropped.most_common():
            rows.add_row(f"{count:,}", reason.sentence, escape(_listed(self.first_rows[reason], count)))
        if self.cut:
            share = self.cut / self.used
            rows.add_row(f"{self.cut:,}", f"(used, but cut at max_length {max_length}: {share:.1%})", "")
        return [rows, self._lengths(max_length)]

    def _lengths(self, max_length: int | None) -> Table:
        lengths = Table(title=f"{self.num_tokens:,} tokens an epoch", title_justify="left")
        lengths.add_column("tokens")
        for name in (*(f"p{percent}" for percent in PERCENTILES), "max"):
            lengths.add_column(name, justify="right")
        for kind in self.kinds():
            lengths.add_row(kind, *(f"{self.percentile(kind, percent):,}" for percent in (*PERCENTILES, 100)))
        lengths.caption = self.suggestion(max_length)
        return lengths


def _sizes(result: Tokenized) -> tuple[dict[str, int], int, int]:
    """Lengths by kind, tokens fed to the model, and trained ones; of a prompt all, what follows is not known yet."""
    if isinstance(result, TokenizedPrompt):
        total = len(result.prompt_ids)
        return {"total": total}, total, total
    if isinstance(result, TokenizedChat):
        total, answer = len(result.input_ids), result.num_trained
        return {"prompt": total - answer, "answer": answer, "total": total}, total, answer
    if isinstance(result, TokenizedLabelled):
        prompt, reply = len(result.prompt_ids), len(result.completion_ids)
        side = "desirable" if result.label else "undesirable"
        return {"prompt": prompt, side: reply, "total": prompt + reply}, prompt + reply, reply
    prompt, chosen, rejected = (len(ids) for ids in result[:3])
    sizes = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "total": prompt + max(chosen, rejected),
    }
    return sizes, 2 * prompt + chosen + rejected, chosen + rejected


def _lowest(places: list[Place]) -> list[Place]:
    return sorted(places)[:NUM_FIRST_ROWS]  # all of one kind in a run


def _name(place: Place) -> str:
    return str(place) if isinstance(place, int) else f"{place[0]}:{place[1]}"


def _listed(places: list[Place], count: int) -> str:
    return ", ".join(map(_name, places)) + (", ..." if count > len(places) else "")
