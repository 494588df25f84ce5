"""A comparison for a reader: one row a prompt, one column a model, as Markdown and on screen.

A row is {"prompt": the text answered, "messages": all its turns, "answers": {model: text}, "measured": {model:
{"num_tokens", "ended", "seconds"}}}; that is a line of comparison.jsonl, too. Of a held-out question it also has
"expected": the answers that count as correct, and "correct" among what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from toolkit.console.panel import CTRL_C
from toolkit.console.screen import is_live, live
from toolkit.console.text import visible
from toolkit.recipe.schema import Recipe
from toolkit.records.comparison_report import AnswerMeasures
from toolkit.report.measures import answer_rows

Row = dict[str, Any]
NARROWEST = 22  # characters a column may have before models stand below each other
DRAWN_PER_SECOND = 8


# Markdown --------------------------------------------------------------------------------------------------


def comparison_markdown(recipe: Recipe, rows: Sequence[Row], models: Mapping[str, AnswerMeasures]) -> str:
    """Measures, then each prompt with its answers as quotes; of the held-out questions only how many there are."""
    names = list(models)
    lines = [f"# {recipe.name}: {' / '.join(names)}", "", recipe.description, ""]
    lines += [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in answer_rows(models)]
    questions = [row for row in rows if "expected" in row]
    for number, row in enumerate((row for row in rows if "expected" not in row), 1):
        turns = row["messages"]
        plain = len(turns) == 1 and "\n" not in row["prompt"]
        lines += ["", f"## {row['prompt']}" if plain else f"## Prompt {number}", ""]
        if not plain:
            lines += [
                line for turn in turns for line in (f"*{turn['role']}*", "", _quoted(turn["content"]), "")
            ]
        for name in names:
            cut = "" if row["measured"][name]["ended"] else " (did not end by itself)"
            lines += [f"**{name}**{cut}", "", _quoted(row["answers"][name]), ""]
    if questions:
        lines += [
            f"The answers to {len(questions)} held-out questions stand in comparison.html and comparison.jsonl."
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "> " + (text.strip().replace("\n", "\n> ") or "(empty)")


# Screen ----------------------------------------------------------------------------------------------------


def show_answers(rows: Sequence[Row], names: Sequence[str], console: Console) -> None:
    """Each prompt and, side by side, its answers."""
    for row in rows:
        texts = {name: answer_text(row["answers"][name], row["measured"][name]["ended"]) for name in names}
        console.print(_exchange(row["messages"], texts, console), "")


def show_measures(models: Mapping[str, AnswerMeasures], console: Console) -> None:
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    for name in models:
        table.add_column(escape(name), justify="right", overflow="fold")
    for label, cells in answer_rows(models):
        table.add_row(label, *cells)
    console.print(table)


@contextmanager
def streaming(
    prompts: Sequence[Sequence[Mapping[str, str]]], names: Sequence[str], console: Console
) -> Iterator[Callable[[str, Callable[[], dict[int, str]]], None]]:
    """On a terminal the answers to these prompts grow in their columns while the block lasts; elsewhere nothing.

    Yields a function of a model's name and one that gives {index of the prompt: its answer so far}. What stands
    there is only a view as high as the terminal, each cell the end of its answer, and is gone afterwards.
    """
    if not is_live(console):
        yield lambda name, texts: None
        return
    heard: dict[str, Callable[[], dict[int, str]]] = dict.fromkeys(names, dict)
    working = names[0]

    def hear(name: str, texts: Callable[[], dict[int, str]]) -> None:
        nonlocal working
        heard[name], working = texts, name

    def draw() -> RenderableType:  # by another thread: Ctrl-C would tear it here, and leave a border behind
        answers = {name: so_far() for name, so_far in heard.items()}
        return Constrain(_view(prompts, answers, working, console), console.width - CTRL_C)

    with live(console, draw, DRAWN_PER_SECOND):
        yield hear


def answer_text(text: str, ended: bool) -> Text:
    """An answer as it may stand on a terminal: control characters made visible, a missing end said."""
    if not text.strip():
        return Text("(empty)", "dim")
    shown = Text(visible(text))
    return shown if ended else shown.append(" … did not end by itself", "yellow")


def _exchange(
    messages: Sequence[Mapping[str, str]], texts: Mapping[str, Text], console: Console, working: str = ""
) -> RenderableType:
    turns = [Text(visible(messages[-1]["content"]), "bold")]
    if len(messages) > 1:
        turns = [
            Text.assemble((f"{turn['role']}: ", "dim"), (visible(turn["content"]), "bold" * last))
            for turn, last in zip(messages, [False] * (len(messages) - 1) + [True], strict=True)
        ]
    if console.width // len(texts) < NARROWEST:
        below = Table(box=box.ROUNDED, show_header=False, show_lines=True, expand=True)
        below.add_column(style="cyan", ratio=1, overflow="fold")
        below.add_column(ratio=4, overflow="fold")
        for name, text in texts.items():
            below.add_row(escape(name), text)
        return Group(*turns, below)
    table = Table(box=box.ROUNDED, expand=True)
    for name in texts:
        table.add_column(
            escape(name), ratio=1, header_style="bold cyan" if name == working else "cyan", overflow="fold"
        )
    table.add_row(*texts.values())
    return Group(*turns, table)


def _view(
    prompts: Sequence[Sequence[Mapping[str, str]]],
    answers: Mapping[str, Mapping[int, str]],
    working: str,
    console: Console,
) -> RenderableType:
    """As many prompts as the terminal is high, one line each, and the last lines of their answers."""
    beside = console.width // len(answers) >= NARROWEST
    around = 5 if beside else 2 + len(answers)  # lines of an exchange that hold no answer
    height = console.height - 2
    num = max(1, min(len(prompts), height // (around + 1)))
    free = max(1, height // num - around)
    lines = free if beside else max(1, free // len(answers))
    width = (console.width // len(answers) if beside else console.width * 3 // 4) - 4
    parts: list[RenderableType] = []
    for index, prompt in enumerate(prompts[:num]):
        texts = {name: _tail(texts.get(index, ""), width, lines, console) for name, texts in answers.items()}
        line = Text(visible(prompt[-1]["content"]).replace("\n", " "))
        line.truncate(console.width, overflow="ellipsis")
        parts.append(_exchange([{"role": "user", "content": line.plain}], texts, console, working))
    if len(prompts) > num:
        parts.append(Text(f"and {len(prompts) - num} more at the same time", "dim"))
    return Group(*parts)


def _tail(text: str, width: int, lines: int, console: Console) -> Text:
    wrapped = Text(visible(text)).wrap(console, max(width, 1), overflow="fold")
    return Text("\n").join(wrapped[-lines:]) if wrapped else Text("…", "dim")
