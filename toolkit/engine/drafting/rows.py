"""The rows that a recipe is written for, read and tokenised as its stage will do it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from toolkit.data import sets
from toolkit.data.accounting import Accounting
from toolkit.data.reasons import Reason
from toolkit.drafting.choices import NUM_PROMPTS
from toolkit.drafting.facts import RowFacts
from toolkit.engine.base.model import LoadedModel
from toolkit.engine.data import preparation
from toolkit.engine.data.reading import load_item, read_sets, rows_of
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import Stage

MOST_ROWS = 20_000  # of a set: enough to tell its lengths, and read within seconds
LONGEST_PROMPT = 300  # characters: what a page shows side by side


def look_at(recipe: Recipe, stage: Stage, loaded: LoadedModel) -> RowFacts:
    """Raises UserError when the set cannot be read, or holds no row of use."""
    section = recipe.section(stage.name)
    masking = preparation.masking_of(section, loaded)
    with tempfile.TemporaryDirectory() as folder:
        pool, chosen = read_sets(
            recipe, section, stage.row_kind, section.datasets, Path(folder), at_most=MOST_ROWS
        )
        items: list[Any] = [load_item(text) for text in pool.rows.select(sorted(chosen.rows))["item"]]
        is_partial = len(pool.keys) >= MOST_ROWS
    batches = (items[at : at + preparation.BATCH] for at in range(0, len(items), preparation.BATCH))
    accounting = sum((Accounting.of(masking.tokenize(stage.row_kind, one)) for one in batches), Accounting())
    if not accounting.used:
        raise UserError(
            f"{section.datasets[0].path}: no row can be trained on\n"
            + "\n".join(accounting.reasons_as_text())
        )
    source = section.datasets[0]
    schema = sets.schema_for(source, stage.row_kind, next(iter(rows_of(recipe, source, True))))
    return RowFacts(schema, accounting, is_partial, tuple(_prompts(items)))


def _prompts(items: list[Any]) -> list[str]:
    """Short first questions, from all over the rows."""
    asked = (_asked(item) for item in items if not isinstance(item, Reason))
    found = list(dict.fromkeys(text for text in asked if text and len(text) <= LONGEST_PROMPT))
    return found[:: max(1, len(found) // NUM_PROMPTS)][:NUM_PROMPTS]


def _asked(item: Any) -> str:
    """What a row of one question asks; "" where it has more turns."""
    turns = item[:-1] if isinstance(item, list) else item.prompt
    return turns[-1]["content"].strip() if len(turns) == 1 else ""
