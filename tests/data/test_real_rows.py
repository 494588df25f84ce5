"""Public rows in ../shared/data, with the counts that its README states. Skipped where the folder is absent."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT
from toolkit.data.rows import Pair, Reason, recognise, to_messages, to_pair
from toolkit.data.selection import Selection, key_of
from toolkit.data.sources import find_files, read_rows
from toolkit.data.template import ChatTemplate, read_template
from toolkit.recipe import stages
from toolkit.recipe.load import load

SAMPLES = ROOT.parent / "shared" / "data"
TOKENIZER = SAMPLES / "tokenizers" / "llama3" / "tokenizer.json"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared/data are not here")


def items(file: str, kind: Any) -> list[Any]:
    rows = list(read_rows(find_files(str(SAMPLES / file))))
    schema = recognise(rows[0], kind, rows[0])
    return [to_messages(row, schema) if kind == "chat" else to_pair(row, schema) for row in rows]


def duplicates(keys: list[Any]) -> int:
    return len(keys) - len(set(map(key_of, keys)))


def test_system_turns() -> None:
    pairs = items("pref/lf_dpo_en_demo.jsonl", "pair")
    assert len(pairs) == 299
    assert sum(pair.prompt[0]["role"] == "system" for pair in pairs) == 80


def test_identical_pairs_and_duplicate_prompts() -> None:
    pairs = items("pref/rasbt_instruction_preference.jsonl", "pair")
    assert len(pairs) == 1100
    assert Counter(pair for pair in pairs if isinstance(pair, Reason)) == {Reason.EQUAL_REPLIES: 6}
    assert duplicates([pair.prompt for pair in pairs if isinstance(pair, Pair)]) == 25


def test_questions_repeat_and_stay_on_one_side() -> None:
    pairs = items("pref/tt_stack_exchange_paired_tiny.jsonl", "pair")
    prompts = [key_of(pair.prompt) for pair in pairs]
    assert len(prompts) == 25 and len(set(prompts)) == 8
    train, held_out = Selection.of(25).hold_out(6, prompts, 3407)
    assert {prompts[row] for row in train.rows}.isdisjoint(prompts[row] for row in held_out.rows)


@pytest.mark.parametrize(
    ("file", "num_rows", "num_duplicates", "dropped"),
    [
        ("sft/lf_alpaca_en_demo.jsonl", 999, 14, {}),
        ("sft/fastchat_dummy_conversation.jsonl", 500, None, {}),
        ("sft/axolotl_conversation_missingturns.jsonl", 1, 0, {Reason.EMPTY_REPLY: 1}),
    ],
)
def test_chats(file: str, num_rows: int, num_duplicates: int | None, dropped: dict[Reason, int]) -> None:
    chats = items(file, "chat")
    assert len(chats) == num_rows and Counter(c for c in chats if isinstance(c, Reason)) == dropped
    assert num_duplicates is None or duplicates(chats) == num_duplicates


def test_finetome_rows_as_a_notebook_prints_them() -> None:
    rows = list(read_rows(find_files(str(SAMPLES / "sft" / "finetome_rows_from_unsloth_notebooks.jsonl"))))
    found = [row["row"] for row in rows]  # a row, or its conversations alone
    chats = [
        to_messages(row if isinstance(row, dict) else {"conversations": row}, "sharegpt") for row in found
    ]
    assert len(chats) == 4 and not any(isinstance(chat, Reason) for chat in chats)


@pytest.fixture(scope="module")
def loaded() -> Any:
    if not TOKENIZER.is_file():
        pytest.skip(f"{TOKENIZER} is not here")
    from tokenizers import Tokenizer

    source = read_template(ROOT / "recipes" / "templates" / "llama3.jinja")
    template = ChatTemplate(source, "<|begin_of_text|>", "<|end_of_text|>")
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(str(TOKENIZER)))
    return SimpleNamespace(tokenizer=tokenizer, template=template, end_of_turn="<|eot_id|>")


@pytest.mark.parametrize(
    ("stage", "file", "num_rows", "num_duplicates"),
    [("sft", "sft/lf_alpaca_en_demo.jsonl", 999, 14), ("dpo", "pref/lf_dpo_en_demo.jsonl", 299, 5)],
)
@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_a_stage_accounts_for_every_row(
    stage: Any,
    file: str,
    num_rows: int,
    num_duplicates: int,
    overlong: str,
    loaded: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toolkit.engine.data import preparation

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {"datasets": [{"path": str(SAMPLES / file)}], "eval_datasets": [], "eval_rows": 20}
    settings |= {"overlong": overlong, "max_length": 512, "max_dropped_fraction": 1.0}
    recipe = load("tiny", tuple(f"{stage}.{key}={json.dumps(value)}" for key, value in settings.items()))
    prepared = preparation.prepare(
        recipe, recipe.section(stage), stages.of(stage).row_kind, loaded, Console(quiet=True)
    )
    report = prepared.report
    assert prepared.eval is not None
    for side, rows in ((report, prepared.train), (report["eval"], prepared.eval)):
        assert side["used"] + sum(side["dropped"].values()) == side["read"]
        assert side["used"] == len(rows) and max(rows["length"]) <= 512
    assert report["selection"][0]["before"] == num_rows
    assert report["read"] + report["eval"]["read"] + num_duplicates == num_rows
    assert set(report["dropped"]) <= {Reason.NO_ROOM, Reason.ANSWER_CUT, Reason.NO_TRAINED_TOKEN}
    assert (report["cut"] > 0) == (overlong == "cut") and (Reason.ANSWER_CUT in report["dropped"]) == (
        overlong == "drop"
    )
