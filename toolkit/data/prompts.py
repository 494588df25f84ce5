"""What the models are asked: prompts of a recipe or a file, and questions whose right answer is known."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.data import sources
from toolkit.data.reasons import Reason
from toolkit.data.rows import SystemTurns, to_prompt
from toolkit.data.turns import Messages
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe

EXPECTED = (
    "one prompt a line in a text file, or rows of {prompt} or {messages} in a .jsonl, .json, .csv or .parquet"
)
MOST_PROBLEMS = 5  # shown of one file


def read_prompts(recipe: Recipe, file: str | None) -> list[Messages]:
    """The recipe's prompts, or those of a file, or of stdin for "-": each the turns that a model is given.

    A prompt may have several turns; one without a system turn gets `compare.system`. Raises UserError, naming the
    lines, for what cannot be read or asks nothing.
    """
    if file is None:
        return [as_messages(recipe, prompt) for prompt in recipe.compare.prompts]
    name = "--prompts - (stdin)" if file == "-" else f"--prompts {file}"
    rows = list(_rows(name, file))
    if not rows:
        raise UserError(f"{name}: no prompt in it; expected is {EXPECTED}")
    prompts, problems = [], []
    for number, row in rows:
        prompt = to_prompt(row, _system_turn(recipe)) if isinstance(row, dict) else Reason.WRONG_TYPE
        if isinstance(prompt, Reason):
            problems.append(f"{name}, row {number}: {prompt.sentence}; expected is {EXPECTED}")
        else:
            has_system = prompt[0]["role"] == "system"
            prompts.append(prompt if has_system else [*_system(recipe), *prompt])
    if problems:
        more = len(problems) - MOST_PROBLEMS
        raise UserError(
            *problems[:MOST_PROBLEMS], *([f"{name}: and {more} more such rows"] if more > 0 else [])
        )
    return prompts


def as_messages(recipe: Recipe, prompt: str) -> Messages:
    """A prompt as the turns a model is given, under the recipe's system turn if it has one."""
    return [*_system(recipe), {"role": "user", "content": prompt}]


def last_turn(prompt: Messages) -> str:
    """The text that is answered."""
    return prompt[-1]["content"]


def read_questions(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows {messages, answer} or {messages, answers} of `compare.questions`; [] when the recipe names none.

    Raises UserError when the file cannot be read or a row lacks a key.
    """
    if recipe.compare.questions is None:
        return []
    file = Path(recipe.locate(recipe.compare.questions))
    expected = "JSON lines of {messages, answer} are expected, the answer a text, or answers, a list of such"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        looked_in = recipe.looked_in(recipe.compare.questions)
        raise UserError(f"compare.questions: there is no file {file}{looked_in}; {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"compare.questions {file}: {error}; {expected}") from None
    for number, row in enumerate(rows, 1):
        asked = to_prompt({"messages": row.get("messages")}) if isinstance(row, dict) else Reason.WRONG_TYPE
        if isinstance(asked, Reason) or not _are_answers(accepted(row)):
            raise UserError(f"compare.questions {file}, row {number}: {expected}")
    return rows


def is_correct(text: str, question: dict[str, Any]) -> bool:
    """Whether one of the accepted answers occurs in the text as whole words, whatever the case."""
    return bool(places(text, accepted(question)))


def places(text: str, expected: Iterable[str]) -> list[tuple[int, int]]:
    """[first, end) of each accepted answer in the text, by character."""
    return [
        found.span()
        for answer in expected
        for found in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
    ]


def accepted(question: dict[str, Any]) -> list[str]:
    """The answers that count as correct."""
    return question.get("answers") or [question.get("answer")]


def _are_answers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value.strip() for value in values)


def _system(recipe: Recipe) -> Messages:
    return [{"role": "system", "content": recipe.compare.system}] if recipe.compare.system else []


def _system_turn(recipe: Recipe) -> SystemTurns:
    """As the rows of the last stage that answers were trained."""
    *_, last = [stage.name for stage in recipe.stages() if stage.answers] or [recipe.stages()[-1].name]
    return recipe.section(last).system_turn


def _rows(name: str, file: str) -> Iterable[tuple[int, Any]]:
    """(line or row number, row); a line of text is {"prompt": line}."""
    path = Path(file)
    if file != "-" and sources.is_readable(file) and path.is_file():
        return sources.read_numbered([path])
    try:
        # Read as bytes: a locale other than UTF-8, and universal newlines, would change the text.
        raw = sys.stdin.buffer.read() if file == "-" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{name}: there is no such file as {path.absolute()}; expected is {EXPECTED}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as UTF-8 text ({error}); expected is {EXPECTED}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file == "-" and lines and lines[0][1].startswith("{"):
        return [(number, _parsed(name, number, line)) for number, line in lines]
    return [(number, {"prompt": line}) for number, line in lines]


def _parsed(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name}, row {number}: not valid JSON ({error}), and row 1 is an object; expected is {EXPECTED}"
        ) from None
