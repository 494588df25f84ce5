"""Rows in the layouts of public sets, made in the project's own words: 20 a layout, with what real sets bring along.

Turns of tools, replies that are empty, equal, of thousands of characters or JSON `true`, U+2028 inside a row, tokens
written out as text, prompts that repeat. The public rows themselves are in ../shared/data where that folder is.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from toolkit.data.rows import Pair, Reason, recognise, to_messages, to_pair
from toolkit.data.sources import find_files, read_rows
from toolkit.data.turns import Messages
from toolkit.recipe.stages import RowKind

SAMPLES = Path(__file__).parent
REAL = ROOT.parent / "shared" / "data"
needs_real_rows = pytest.mark.skipif(
    not REAL.is_dir(), reason="the public rows of ../shared/data are not here"
)


def read(file: Path, kind: RowKind) -> list[Any]:
    """The rows as a stage reads them: Messages or Pair, or the Reason why not."""
    rows = list(read_rows(find_files(str(file))))
    schema = recognise(rows[0], kind, rows[0])
    return [to_messages(row, schema) if kind == "chat" else to_pair(row, schema) for row in rows]


def chats(name: str) -> list[Messages]:
    return [chat for chat in read(SAMPLES / f"{name}.jsonl", "chat") if not isinstance(chat, Reason)]


def pairs(name: str) -> list[Pair]:
    return [pair for pair in read(SAMPLES / f"{name}.jsonl", "pair") if not isinstance(pair, Reason)]
