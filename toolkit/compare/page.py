"""A comparison as one HTML file: a column a model, differences marked, a blind mode, and votes that become pairs.

The rows stand in it as JSON, prompts first, then the held-out questions, the wrongly answered ones before the others;
page.js, written into the page, shows them. Votes are of prompts only, stay in the browser until they are downloaded,
and are JSON lines in the layout that `dpo.datasets` reads.
"""

from __future__ import annotations

import bisect
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from toolkit.compare.view import Row
from toolkit.data.prompts import places
from toolkit.records.comparison_report import AnswerMeasures
from toolkit.report.html import document
from toolkit.report.measures import answer_rows

SCRIPTS = (Path(__file__).with_suffix(".js"), Path(__file__).with_name("votes.js"))
STYLE = """
body { max-width: 110rem; }
button, select, input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: .35rem; padding: .3rem .7rem; }
button { cursor: pointer; }
button:disabled { opacity: .5; cursor: default; }
button:enabled:hover { border-color: var(--accent); }
button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--paper); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.about, .note, kbd { color: var(--quiet); font-size: .9rem; }
kbd { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem; font-family: inherit; }
.bar { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center;
  padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.bar input { flex: 1 1 12rem; min-width: 8rem; }
summary { cursor: pointer; color: var(--quiet); margin-top: .5rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 1rem .15rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: normal; color: var(--quiet); }
h2 { margin-top: 2rem; } h2 + .about { margin-bottom: 0; }
[hidden] { display: none !important; }
thead th { border-bottom: 1px solid var(--line); }
article { margin: 1.2rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem;
  scroll-margin-top: 4.5rem; content-visibility: auto; contain-intrinsic-size: auto 16rem; }
article.here { border-color: var(--accent); }
article:focus { outline: none; }
.turn, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.turn { margin: .2rem 0; }
.turn:last-child { font-weight: 600; }
.role { color: var(--quiet); font-weight: normal; font-size: .85rem; margin-right: .5rem; }
.answers { display: grid; gap: .75rem; margin-top: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(15rem, 100% / var(--columns) - .75rem)), 1fr)); }
.answer { display: flex; flex-direction: column; gap: .5rem; min-width: 0; padding: .6rem .7rem;
  background: var(--panel); border: 1px solid transparent; border-radius: .35rem; }
.answer.won { border-color: var(--good); }
.answer h3 { margin: 0; font-size: .9rem; color: var(--quiet); display: flex; justify-content: space-between; }
.answer h3 span { font-weight: normal; }
.text { flex: 1; }
.cut { color: var(--warn); } .wrong { color: var(--bad); } .right { color: var(--good); }
mark { color: inherit; border-radius: .2rem; background: color-mix(in srgb, var(--accent) 22%, transparent); }
mark.expected { background: color-mix(in srgb, var(--good) 22%, transparent); border-bottom: 2px solid var(--good); }
.tally { display: flex; gap: .5rem; align-items: center; }
.votes { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .75rem; align-items: center; }
.voice { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 44rem) {
  body { padding: .6rem .6rem 4rem; } article { padding: .7rem; scroll-margin-bottom: 4rem; } .bar { position: static; }
  .bar select { flex: 1 1 40%; min-width: 0; }
  th:first-child { white-space: normal; min-width: 9rem; }
  .tally { position: fixed; z-index: 1; inset: auto 0 0; padding: .5rem .6rem; justify-content: space-between;
    background: var(--paper); border-top: 1px solid var(--line); }
  .tally button { white-space: nowrap; }
}
"""
BODY = """
<header id="header"></header>
<div id="measures"></div>
<div class="bar" role="toolbar" aria-label="what is shown">
<button id="blind" aria-pressed="false" title="hide the names, shuffle the columns (b)">blind</button>
<input id="search" type="search" placeholder="search" aria-label="search prompts and answers">
<select id="filter" aria-label="which prompts"></select>
<select id="against" aria-label="mark differences"></select>
<span class="tally"><span id="progress" role="status"></span>
<button id="undo" title="take the last vote back (u)" disabled>undo</button>
<button id="download" disabled>download votes</button></span>
</div>
<p class="note" id="note"></p>
<main>PARTS</main>
<p class="note"><kbd>1</kbd> <kbd>2</kbd> \u2026 this one is better \u00b7 <kbd>t</kbd> tie \u00b7
<kbd>s</kbd> skip \u00b7 <kbd>u</kbd> undo \u00b7 <kbd>j</kbd> <kbd>k</kbd> next and previous \u00b7
<kbd>b</kbd> blind \u00b7 <kbd>/</kbd> search</p>
<noscript><p>This page shows its rows by a script; comparison.jsonl holds the same.</p></noscript>
"""
PROMPTS = '<section class="part" id="prompts"><h2>{num} prompt{s}</h2></section>'
QUESTIONS = """<section class="part" id="questions"><h2>{num} held-out question{s}</h2>
<p class="about">Wrongly answered ones first, by the last model, then by those before it. Correct is an answer in which
an expected one stands as whole words; it is <mark class="expected">marked</mark>. Votes become rows to train on, and
these rows measure: they take none.</p></section>"""


class Described(Protocol):
    """What the page says of a recipe."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...


def identity(rows: Sequence[Row]) -> str:
    """Names what is voted on, whatever was measured of it."""
    prompts = [[row["messages"], row["answers"]] for row in rows if "expected" not in row]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def page(
    recipe: Described,
    rows: Sequence[Row],
    models: Mapping[str, AnswerMeasures],
    cast: Sequence[Any] | None = None,
) -> str:
    """The whole file. With `cast`, the votes so far, it sends them to where it came from instead of keeping them."""
    names = list(models)
    prompts = [row for row in rows if "expected" not in row]
    questions = sorted(
        (row for row in rows if "expected" in row),
        key=lambda row: [row["measured"][name]["correct"] for name in reversed(names)],
    )
    content = {
        "recipe": recipe.name,
        "description": recipe.description,
        "names": names,
        "measures": [[label, *cells] for label, cells in answer_rows(models)],
        "rows": [_row(row, names) for row in (*prompts, *questions)],
        "id": identity(rows),
        "cast": cast,
    }
    script = "\n".join(file.read_text(encoding="utf-8") for file in SCRIPTS)
    parts = [
        part.format(num=f"{len(of_part):,}", s="s" * (len(of_part) != 1))
        for part, of_part in ((PROMPTS, prompts), (QUESTIONS, questions))
        if of_part
    ]
    body = BODY.replace("PARTS", "".join(parts))
    body = f'{body}<script type="application/json" id="data">{_embedded(content)}</script>\n<script>{script}</script>'
    return document(
        f"{recipe.name}: {len(names)} models compared", body, STYLE, scripts=True, sends=cast is not None
    )


def _row(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """Turns, each answer as words, and which words of each differ from each other answer: [first, end) by word."""
    words = [_words(row["answers"][name]) for name in names]
    asked = {}
    if expected := row.get("expected"):
        asked = {
            "expected": expected,
            "correct": [row["measured"][name]["correct"] for name in names],
            "found": [_expected(own, expected) for own in words],
        }
    return asked | {
        "turns": row["messages"],
        "words": words,
        "ended": [row["measured"][name]["ended"] for name in names],
        "tokens": [row["measured"][name]["num_tokens"] for name in names],
        "marks": [[_differing(other, own) for other in words] for own in words],
    }


def _words(text: str) -> list[str]:
    """Words with the white space after them; joined, they are the text."""
    return re.findall(r"\S+\s*|\s+", text)


def _expected(words: Sequence[str], expected: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of words in which an expected answer stands."""
    ends = list(itertools.accumulate(map(len, words)))
    return [
        (bisect.bisect_right(ends, start), bisect.bisect_left(ends, end) + 1)
        for start, end in places("".join(words), expected)
    ]


def _differing(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of words in `after` that `before` lacks at their place."""
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in before], [word.strip() for word in after], autojunk=False
    )
    return [
        (start, end) for what, _, _, start, end in matcher.get_opcodes() if what != "equal" and start < end
    ]


def _embedded(content: Any) -> str:
    """JSON that no text in it can end: `<`, which only occurs inside its strings, is spelled otherwise.

    So are half characters, which UTF-8 lacks.
    """
    text = json.dumps(content, ensure_ascii=False)
    return re.sub(r"[<\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
