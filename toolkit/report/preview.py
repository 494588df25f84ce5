"""Rows as the model will see them, token by token: what is trained, what is masked, what is wrong. Pure.

`choose` picks rows of each kind, `chat_example` and `pair_example` take them apart, `show` prints them;
preview_page.py makes the same into one HTML file.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from toolkit.data.accounting import Place
from toolkit.data.masking import (
    IGNORE_INDEX,
    Tokenized,
    TokenizedChat,
    TokenizedLabelled,
    TokenizedPair,
    TokenizedPrompt,
)
from toolkit.data.reasons import Reason

HEAD, TAIL = 160, 60  # tokens of a long run that a terminal shows; the page shows all
WIDE = 100  # columns from which a pair stands side by side


class Piece(NamedTuple):
    """One token, or the few that share a character; `text` is what they decode to."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


class Check(NamedTuple):
    passed: bool
    text: str


class Part(NamedTuple):
    """A sequence or a piece of one, under its name."""

    title: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Example:
    """One row. A chat has one part, a labelled reply two, a pair three: shared prompt, chosen, rejected; a dropped row
    its `text`."""

    kind: str
    place: Place
    parts: tuple[Part, ...] = ()
    checks: tuple[Check, ...] = ()
    text: str = ""

    @property
    def title(self) -> str:
        row = f"row {self.place}" if isinstance(self.place, int) else f"{self.place[0]}, row {self.place[1]}"
        return f"{self.kind} · {row}"


@dataclass
class Preview:
    """Everything that is shown of a stage."""

    title: str
    about: list[str]
    examples: list[Example] = field(default_factory=list)


def choose(
    results: Sequence[Tokenized | Reason], num_turns: Sequence[int], num: int
) -> list[tuple[str, int]]:
    """(kinds, index) of up to `num` rows of each kind, then of the first row that each reason dropped.

    `num_turns` counts the assistant turns of a row.
    """
    used = [i for i, result in enumerate(results) if not isinstance(result, Reason)]
    by_length = sorted(used, key=lambda i: _length(results[i]))
    median = _length(results[by_length[len(by_length) // 2]]) if by_length else 0
    kinds: list[tuple[str, Iterable[int]]] = [
        ("typical", sorted(used, key=lambda i: abs(_length(results[i]) - median))),
        ("longest", reversed(by_length)),
        ("cut", [i for i in used if _is_cut(results[i])]),
        ("multi-turn", [i for i in used if num_turns[i] > 1]),
    ]
    chosen: dict[int, list[str]] = {}
    for kind, indices in kinds:
        for i in itertools.islice(indices, num):
            chosen.setdefault(i, []).append(kind)
    dropped: dict[Reason, int] = {}
    for i, result in enumerate(results):
        if isinstance(result, Reason):
            dropped.setdefault(result, i)
    named = [(", ".join(kinds_of_row), i) for i, kinds_of_row in chosen.items()]
    return named + [(f"dropped: {reason}", i) for reason, i in dropped.items()]


def _length(result: Tokenized | Reason) -> int:
    if isinstance(result, TokenizedChat):
        return len(result.input_ids)
    if isinstance(result, TokenizedLabelled):
        return len(result.prompt_ids) + len(result.completion_ids)
    if isinstance(result, TokenizedPrompt):
        return len(result.prompt_ids)
    assert isinstance(result, TokenizedPair)
    return len(result.prompt_ids) + max(len(result.chosen_ids), len(result.rejected_ids))


def _is_cut(result: Tokenized | Reason) -> bool:
    return not isinstance(result, Reason) and result.cut


# Taking a row apart ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Ids -> pieces and checks. `bos` is None where the tokenizer has no BOS token."""

    tokenizer: Tokenizer
    bos: str | None
    end_of_turn: str

    def example(self, kind: str, place: Place, row: Tokenized) -> Example:
        """A row that is used, taken apart."""
        if isinstance(row, TokenizedPrompt):
            ids = row.prompt_ids
            title = (
                f"{len(ids):,} tokens to answer; right: {', '.join(json.loads(row.answers)) or 'not known'}"
            )
            part = Part(title, self.pieces(ids, [False] * len(ids)))
            return Example(kind, place, (part,), (self._bos_check(ids),))
        if isinstance(row, TokenizedChat):
            return self.chat_example(kind, place, row)
        if isinstance(row, TokenizedLabelled):
            side = "desirable" if row.label else "undesirable"
            return self._replies(kind, place, "prompt", row.prompt_ids, {side: row.completion_ids}, row.cut)
        return self.pair_example(kind, place, row)

    def chat_example(self, kind: str, place: Place, chat: TokenizedChat) -> Example:
        trained = [label != IGNORE_INDEX for label in chat.labels]
        part = Part(
            f"{len(trained):,} tokens, {sum(trained):,} trained", self.pieces(chat.input_ids, trained)
        )
        runs = [ids for is_trained, ids in _runs(chat.input_ids, trained) if is_trained]
        return Example(
            kind, place, (part,), (self._bos_check(chat.input_ids), self._end_check(runs, chat.cut))
        )

    def pair_example(self, kind: str, place: Place, pair: TokenizedPair) -> Example:
        sides = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
        return self._replies(kind, place, "shared prompt", pair.prompt_ids, sides, pair.cut)

    def _replies(
        self, kind: str, place: Place, title: str, prompt: list[int], sides: dict[str, list[int]], cut: bool
    ) -> Example:
        """A prompt and the replies to it, by name."""
        masked = self.pieces(prompt, [False] * len(prompt))
        parts = [Part(f"{title}: {len(prompt):,} tokens, masked", masked)]
        for name, ids in sides.items():
            parts.append(Part(f"{name}: {len(ids):,} tokens, trained", self.pieces(ids, [True] * len(ids))))
        first, *_ = sides.values()
        checks = (self._bos_check(prompt + first), self._end_check(list(sides.values()), cut))
        return Example(kind, place, tuple(parts), checks)

    def pieces(self, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
        """Tokens in order; those that only together make a character are one piece."""
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        stream, held, pieces = DecodeStream(skip_special_tokens=False), [], []
        for position, (i, is_trained) in enumerate(zip(ids, trained, strict=True)):
            held.append(i)
            text = stream.step(self.tokenizer, i)
            is_last = position + 1 == len(ids) or trained[position + 1] != is_trained
            if text is None and not is_last:
                continue
            pieces.append(Piece(text or "\ufffd", tuple(held), is_trained, i in special))
            held = []
        return pieces

    def _bos_check(self, ids: Sequence[int]) -> Check:
        if self.bos is None:
            return Check(True, "no BOS: this tokenizer has none")
        count = sum(self.tokenizer.id_to_token(i) == self.bos for i in ids)
        if count == 1 and self.tokenizer.id_to_token(ids[0]) == self.bos:
            return Check(True, f"one BOS, {self.bos}, at the start")
        return Check(False, f"{count} times BOS, {self.bos}; one is expected, at the start")

    def _end_check(self, runs: list[list[int]], cut: bool) -> Check:
        end = self.tokenizer.token_to_id(self.end_of_turn)
        closed = sum(ids[-1] == end for ids in runs if ids)
        text = f"{closed} of {len(runs)} replies end in {self.end_of_turn}"
        return Check(closed == len(runs), f"{text}; cut at max_length" if cut else text)


def _runs(ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for i, is_trained in zip(ids, trained, strict=True):
        if not runs or runs[-1][0] != is_trained:
            runs.append((is_trained, []))
        runs[-1][1].append(i)
    return runs


# The terminal ------------------------------------------------------------------------------------------------

STYLES = {  # (trained, special): two shades, so that the edges of tokens show
    (True, False): ("bold green", "green"),
    (True, True): ("black on green", "black on green"),
    (False, False): ("grey62", "grey50"),
    (False, True): ("cyan", "cyan"),
}


def show(preview: Preview, console: Console) -> None:
    """Prints every example; where there is no colour, trained text stands between \u27e6 and \u27e7."""
    plain = console.no_color or console.color_system is None
    console.print(Text(preview.title, style="bold"))
    for line in preview.about:
        console.print(Text(line, style="dim"))
    console.print(_legend(plain))
    for example in preview.examples:
        console.print()
        console.rule(Text(example.title, style="bold"), align="left", style="dim")
        for check in example.checks:
            console.print(
                Text(f"{'ok' if check.passed else 'no'}  {check.text}", "dim" if check.passed else "bold red")
            )
        for block in _blocks(example, plain, console.width):
            console.print(block)


def _legend(plain: bool) -> Text:
    legend = Text()
    for text, trained, special in (
        ("trained", True, False), ("<|end|>", True, True), ("masked", False, False), ("<|start|>", False, True)
    ):  # fmt: skip
        legend.append(f"\u27e6{text}\u27e7" if plain and trained else text, STYLES[trained, special][0])
        legend.append("  ")
    return legend


def _blocks(example: Example, plain: bool, width: int) -> list[RenderableType]:
    if example.text:
        return [Text(example.text)]
    texts = [_text(part.pieces, plain) for part in example.parts]
    if len(texts) == 1:
        return [Text(example.parts[0].title, style="dim"), texts[0]]
    side = width // 2 - 1 if width >= WIDE else width
    panels = [
        Panel(text, title=Text(part.title), title_align="left", border_style="dim", width=wide)
        for part, text, wide in zip(example.parts, texts, (width, side, side), strict=True)
    ]
    return [panels[0], Columns(panels[1:], padding=(0, 1))] if width >= WIDE else list(panels)


def _text(pieces: list[Piece], plain: bool) -> Text:
    text, at = Text(), 0
    while at < len(pieces):
        trained = pieces[at].trained
        end = next((i for i in range(at, len(pieces)) if pieces[i].trained != trained), len(pieces))
        if plain and trained:
            text.append("\u27e6")
        for number in range(at, end):
            if at + HEAD <= number < end - TAIL and end - at > HEAD + TAIL + 20:
                if number == at + HEAD:
                    text.append(f" \u2026 {end - at - HEAD - TAIL:,} more \u2026 ", "italic dim")
                continue
            piece = pieces[number]
            shown = piece.text.replace("\n", "\u21b5\n") if not piece.special else piece.text
            text.append(shown, STYLES[trained, piece.special][number % 2])
        if plain and trained:
            text.append("\u27e7")
        at = end
    return text
