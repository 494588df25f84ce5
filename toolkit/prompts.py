"""What the models are asked: prompts of a recipe or a file, and questions whose right answer is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe import Recipe
from toolkit.turns import Messages


def read_prompts(recipe: Recipe, file: Path | None) -> list[str]:
    """The recipe's prompts, or those of a text file, one a line. Raises UserError when there is none."""
    if file is None:
        return list(recipe.compare.prompts)
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {file}: cannot be read as UTF-8 text ({error}); one prompt a line"
        ) from None
    if not prompts:
        raise UserError(f"--prompts {file}: no prompt in it; one prompt a line")
    return prompts


def as_messages(recipe: Recipe, prompt: str) -> Messages:
    """A prompt as the turns a model is given, under the recipe's system turn if it has one."""
    system = [{"role": "system", "content": recipe.compare.system}] if recipe.compare.system else []
    return [*system, {"role": "user", "content": prompt}]


def read_questions(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows {messages, answer} or {messages, answers} of `compare.questions`; [] when the recipe names none.

    Raises UserError when the file cannot be read or a row lacks a key.
    """
    if recipe.compare.questions is None:
        return []
    file = Path(recipe.locate(recipe.compare.questions))
    due = "JSON lines of {messages, answer} are due"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"compare.questions {file}: {error}; {due}") from None
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and "messages" in row and {"answer", "answers"} & row.keys()):
            raise UserError(f"compare.questions {file}, row {number}: {due}")
    return rows


def is_correct(text: str, question: dict[str, Any]) -> bool:
    """Whether one of the accepted answers occurs in the text as whole words, whatever the case."""
    accepted = question.get("answers") or [question["answer"]]
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in accepted)
