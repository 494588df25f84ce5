"""Rows as public sets have them: each is used, or left out for a reason that is counted, and nothing else is lost."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.samples import REAL, SAMPLES, needs_real_rows, read
from tests.small_tokenizers import byte_level
from toolkit.data.reasons import Reason
from toolkit.data.rows import Pair, to_messages
from toolkit.data.selection import Selection, key_of
from toolkit.data.sources import find_files, read_rows
from toolkit.data.template import ChatTemplate, read_template
from toolkit.recipe import stages
from toolkit.recipe.load import load

# rows, of them with a system turn, that ask (a pair) or are (a chat) what an earlier one is; why rows are not used
SHIPPED = {
    ("alpaca", "chat"): (20, 0, 2, {Reason.EMPTY_REPLY: 1, Reason.WRONG_TYPE: 1}),
    ("sharegpt", "chat"): (
        *(20, 2, 1),
        {Reason.OUT_OF_ORDER: 2, Reason.EMPTY_REPLY: 1, Reason.ENDS_ON_USER: 1},
    ),
    ("messages", "chat"): (20, 2, 1, {Reason.EMPTY_PROMPT: 1, Reason.TOOL_CALL: 1}),
    ("question_response", "chat"): (20, 0, 2, {}),
    ("question_response", "pair"): (20, 0, 12, {}),
    ("conversations_chosen_rejected", "pair"): (20, 6, 1, {Reason.EMPTY_REPLY: 1}),
    ("instruction_chosen_rejected", "pair"): (20, 0, 3, {Reason.EQUAL_REPLIES: 2}),
    ("prompt_chosen_rejected", "pair"): (
        *(20, 3, 1),
        {
            Reason.EQUAL_REPLIES: 1,
            Reason.EARLIER_TURNS_DIFFER: 1,
            Reason.EMPTY_REPLY: 1,
            Reason.ENDS_ON_USER: 1,
        },
    ),
    ("chatml", "pair"): (
        *(20, 11, 1),
        {Reason.EQUAL_REPLIES: 1, Reason.UNPARSABLE_MARKUP: 1, Reason.EMPTY_REPLY: 1},
    ),
}
PUBLIC = {  # as the README beside them counts
    ("sft/lf_alpaca_en_demo", "chat"): (999, 0, 14, {}),
    ("sft/fastchat_dummy_conversation", "chat"): (500, 0, 0, {}),
    ("sft/axolotl_conversation_missingturns", "chat"): (1, 0, 0, {Reason.EMPTY_REPLY: 1}),
    ("pref/lf_dpo_en_demo", "pair"): (299, 80, 5, {}),
    ("pref/rasbt_instruction_preference", "pair"): (1100, 0, 25, {Reason.EQUAL_REPLIES: 6}),
    ("pref/tt_stack_exchange_paired_tiny", "pair"): (25, 0, 17, {}),
}
CASES = [pytest.param(SAMPLES / f"{name}.jsonl", kind, *row) for (name, kind), row in SHIPPED.items()] + [
    pytest.param(REAL / f"{name}.jsonl", kind, *row, marks=needs_real_rows)
    for (name, kind), row in PUBLIC.items()
]


@pytest.mark.parametrize(("file", "kind", "num_rows", "num_system", "num_repeats", "reasons"), CASES)
def test_each_row_is_read_or_has_its_reason(
    file: Path, kind: Any, num_rows: int, num_system: int, num_repeats: int, reasons: dict[Reason, int]
) -> None:
    rows = read(file, kind)
    used = [row for row in rows if not isinstance(row, Reason)]
    asked = [row.prompt if isinstance(row, Pair) else row for row in used]
    assert len(rows) == num_rows
    assert Counter(row for row in rows if isinstance(row, Reason)) == reasons
    assert sum(turns[0]["role"] == "system" for turns in asked) == num_system
    assert len(asked) - len(set(map(key_of, asked))) == num_repeats


@pytest.mark.parametrize(
    ("file", "num_questions"),
    [
        (SAMPLES / "question_response.jsonl", 8),
        pytest.param(REAL / "pref/tt_stack_exchange_paired_tiny.jsonl", 8, marks=needs_real_rows),
    ],
)
def test_questions_repeat_and_stay_on_one_side(file: Path, num_questions: int) -> None:
    prompts = [key_of(pair.prompt) for pair in read(file, "pair")]
    assert len(set(prompts)) == num_questions < len(prompts)
    train, held_out = Selection.of(len(prompts)).hold_out(6, prompts, 3407)
    assert {prompts[row] for row in train.rows}.isdisjoint(prompts[row] for row in held_out.rows)


@needs_real_rows
def test_finetome_rows_as_a_notebook_prints_them() -> None:
    rows = list(read_rows(find_files(str(REAL / "sft" / "finetome_rows_from_unsloth_notebooks.jsonl"))))
    found = [row["row"] for row in rows]  # a row, or its conversations alone
    chats = [
        to_messages(row if isinstance(row, dict) else {"conversations": row}, "sharegpt") for row in found
    ]
    assert len(chats) == 4 and not any(isinstance(chat, Reason) for chat in chats)


def loaded(file: Path) -> Any:
    """What a stage prepares rows with: Llama 3's tokenizer for public rows, a small one of its family for others."""
    tokenizer = byte_level()
    if file.is_relative_to(REAL):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(REAL / "tokenizers" / "llama3" / "tokenizer.json"))
    source = read_template(ROOT / "recipes" / "templates" / "llama3.jinja")
    template = ChatTemplate(source, "<|begin_of_text|>", "<|end_of_text|>")
    return SimpleNamespace(
        tokenizer=SimpleNamespace(backend_tokenizer=tokenizer), template=template, end_of_turn="<|eot_id|>"
    )


@pytest.mark.parametrize(
    ("stage", "file", "num_rows", "num_duplicates", "num_held_out", "max_length"),
    [
        ("sft", SAMPLES / "alpaca.jsonl", 20, 2, 4, 256),
        ("dpo", SAMPLES / "conversations_chosen_rejected.jsonl", 20, 0, 4, 192),
        pytest.param("sft", REAL / "sft/lf_alpaca_en_demo.jsonl", 999, 14, 20, 512, marks=needs_real_rows),
        pytest.param("dpo", REAL / "pref/lf_dpo_en_demo.jsonl", 299, 5, 20, 512, marks=needs_real_rows),
    ],
)
@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_a_stage_accounts_for_every_row(
    stage: Any,
    file: Path,
    num_rows: int,
    num_duplicates: int,
    num_held_out: int,
    max_length: int,
    overlong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toolkit.engine.data import preparation

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {"datasets": [{"path": str(file)}], "eval_datasets": [], "eval_rows": num_held_out}
    settings |= {"overlong": overlong, "max_length": max_length, "max_dropped_fraction": 1.0}
    recipe = load("tiny", tuple(f"{stage}.{key}={json.dumps(value)}" for key, value in settings.items()))
    prepared = preparation.prepare(
        recipe, recipe.section(stage), stages.of(stage).row_kind, loaded(file), Console(quiet=True)
    )
    report = prepared.report
    assert prepared.eval is not None and report.eval is not None
    for side, rows in ((report, prepared.train), (report.eval, prepared.eval)):
        assert side.used + sum(side.dropped.values()) == side.read
        assert side.used == len(rows) and max(rows["length"]) <= max_length
    assert report.selection[0].before == num_rows
    assert report.read + report.eval.read + num_duplicates == num_rows
    by_length = {Reason.NO_ROOM, Reason.ANSWER_CUT, Reason.NO_TRAINED_TOKEN}
    of_rows = {Reason.EMPTY_REPLY, Reason.WRONG_TYPE, Reason.SPECIAL_TOKEN_IN_TEXT}
    assert set(report.dropped) <= (by_length if file.is_relative_to(REAL) else by_length | of_rows)
    assert (report.cut > 0) == (overlong == "cut") and (Reason.ANSWER_CUT in report.dropped) == (
        overlong == "drop"
    )
