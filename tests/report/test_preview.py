"""--preview: what is chosen, how a row is taken apart, and the page and the terminal that show it."""

import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.data.test_masking import chat, masking
from tests.small_tokenizers import byte_level
from toolkit.data.masking import Tokenized, TokenizedChat, TokenizedLabelled, TokenizedPair
from toolkit.data.reasons import Reason
from toolkit.data.rows import Labelled, Pair
from toolkit.report.preview import Check, Example, Part, Piece, Preview, Reader, choose, show
from toolkit.report.preview_page import page

READER = Reader(byte_level(), "<|begin_of_text|>", "<|eot_id|>")


def chat_of(length: int, cut: bool = False) -> TokenizedChat:
    return TokenizedChat([1] * length, [1] * length, cut)


def test_rows_of_each_kind_are_chosen() -> None:
    results: list[Tokenized | Reason] = [
        Reason.EMPTY_REPLY,
        chat_of(5),
        chat_of(50, cut=True),
        chat_of(9),
        Reason.WRONG_TYPE,
        chat_of(10),
        Reason.EMPTY_REPLY,
        chat_of(30),
    ]
    assert choose(results, [0, 1, 1, 3, 0, 1, 0, 1], 1) == [
        ("typical", 5),
        ("longest, cut", 2),
        ("multi-turn", 3),
        ("dropped: empty_reply", 0),
        ("dropped: wrong_type", 4),
    ]
    assert [i for _, i in choose(results, [0, 1, 1, 3, 0, 1, 0, 1], 9)] == [5, 3, 1, 7, 2, 0, 4]
    assert choose([Reason.NO_TURNS], [0], 3) == [("dropped: no_turns", 0)]


@pytest.mark.parametrize("text", ["an answer", "def f(x):\n        return 1", "é 日本語 👩‍👩‍👧", " \n x"])
def test_pieces_say_what_the_tokens_say(text: str) -> None:
    [result] = masking("bytes", "llama3").chats([chat("the é👍", text)])
    example = READER.chat_example("typical", 3, result)
    pieces = example.parts[0].pieces
    assert [i for piece in pieces for i in piece.ids] == result.input_ids
    assert sum(len(piece.ids) for piece in pieces if piece.trained) == result.num_trained
    assert "".join(piece.text for piece in pieces if piece.trained) == text.strip() + "<|eot_id|>"
    named = [piece.text for piece in pieces if piece.special]
    assert named[:2] == ["<|begin_of_text|>", "<|start_header_id|>"] and named[-1] == "<|eot_id|>"
    assert all(check.passed for check in example.checks)


def test_what_is_wrong_with_a_row_is_said() -> None:
    [good] = masking("bytes", "llama3").chats([chat("the", "an", "the", "an answer")])
    double = TokenizedChat([good.input_ids[0], *good.input_ids], [good.labels[0], *good.labels], False)
    [cut] = masking("bytes", "llama3", len(good.input_ids) - 1).chats([chat("the", "an", "the", "an answer")])
    said = [READER.chat_example("", 1, result).checks for result in (good, double, cut)]
    assert said[0] == (
        Check(True, "one BOS, <|begin_of_text|>, at the start"),
        Check(True, "2 of 2 replies end in <|eot_id|>"),
    )
    assert said[1][0] == Check(False, "2 times BOS, <|begin_of_text|>; one is expected, at the start")
    assert said[2][1] == Check(False, "1 of 2 replies end in <|eot_id|>; cut at max_length")
    assert Reader(byte_level(), None, "<|eot_id|>").chat_example("", 1, good).checks[0].passed


def test_a_pair_has_its_prompt_once() -> None:
    [pair] = masking("bytes", "llama3").pairs(
        [Pair(chat("the"), chat("", "yes the")[1:], chat("", "an")[1:])]
    )
    assert isinstance(pair, TokenizedPair)
    example = READER.pair_example("typical", ("a.jsonl", 7), pair)
    assert example.title == "typical · a.jsonl, row 7"
    texts = ["".join(piece.text for piece in part.pieces) for part in example.parts]
    assert texts[0].endswith("assistant<|end_header_id|>\n\n") and texts[1:] == [
        "yes the<|eot_id|>",
        "an<|eot_id|>",
    ]
    assert [{piece.trained for piece in part.pieces} for part in example.parts] == [{False}, {True}, {True}]


def test_a_labelled_reply_is_named_by_its_label() -> None:
    [row] = masking("bytes", "llama3").labelled([Labelled(chat("the"), chat("", "yes the")[1:], False)])
    assert isinstance(row, TokenizedLabelled)
    example = READER.example("typical", 1, row)
    assert [part.title for part in example.parts] == [
        f"prompt: {len(row.prompt_ids)} tokens, masked",
        f"undesirable: {len(row.completion_ids)} tokens, trained",
    ]
    assert all(check.passed for check in example.checks)


NASTY = "<script>alert('&')</script>\n"
PREVIEW = Preview(
    "tiny · dpo",
    ["a <set>"],
    [
        Example(
            "typical",
            1,
            (
                Part(
                    "shared prompt",
                    [Piece("<|start|>", (1,), False, True), Piece(NASTY, (2, 3), False, False)],
                ),
                Part("chosen", [Piece("yes", (4,), True, False), Piece("<|end|>", (5,), True, True)]),
                Part("rejected", [Piece(f" {i}", (i,), True, False) for i in range(500)]),
            ),
            (Check(True, "fine"), Check(False, "not fine")),
        ),
        Example("dropped: empty_reply", 2, text=NASTY),
    ],
)


def test_the_page_is_one_file_that_asks_nobody() -> None:
    text = page(PREVIEW)
    assert not re.search(r"https?:|//|src=|url\(|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert html.escape(NASTY.strip(), quote=False).split("\n")[0][:20] in text
    assert '<b title="4">yes</b><b class="special" title="5">&lt;|end|&gt;</b>' in text
    assert '<li class="bad">not fine</li>' in text and " 499</b>" in text
    assert text.count('<div class="pair">') == 1


@pytest.mark.parametrize("width", [60, 140])
def test_the_terminal_shows_colours_or_marks(width: int) -> None:
    def shown(**colour: Any) -> str:
        console = Console(file=io.StringIO(), width=width, **colour)
        show(PREVIEW, console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    plain = shown()
    assert "\x1b" not in plain and "⟦yes<|end|>⟧" in plain and "280 more" in plain and "no  not fine" in plain
    coloured = shown(force_terminal=True, color_system="256")
    assert "⟦" not in coloured and "\x1b[1;32myes\x1b[0m" in coloured
    side_by_side = any("chosen" in line and "rejected" in line for line in plain.splitlines())
    assert side_by_side == (width > 100)
    assert max(map(len, plain.splitlines())) <= width


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and no model."""
    folder = tmp_path_factory.mktemp("base")
    byte_level().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_preview_needs_neither_model_nor_gpu(stage: str, base: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"the {i}", "chosen": "a" * i, "rejected": "an"} for i in range(30)
    ]
    rows = [row | {"completion": row["chosen"]} if stage == "sft" else row for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.path": base, "template.pad_token": "</s>", f"{stage}.datasets.0.path": tmp_path / "a.jsonl",
        f"{stage}.max_length": 30, f"{stage}.overlong": "cut", f"{stage}.eval_datasets": "[]", "gpu": "rtx4090",
    }  # fmt: skip
    command = [
        sys.executable,
        f"run_{stage}.py",
        "--recipe",
        "tiny",
        "--runs",
        str(tmp_path),
        "--preview",
        "2",
    ]
    if stage == "sft":
        settings["sft.datasets.0.schema"] = "prompt_completion"
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "tiny" / stage / "preview.html").read_text()
    for words in ("typical", "longest", "cut", "dropped: empty_reply", "row 1", "one BOS"):
        assert words in done.stdout and words in text
    assert not done.stderr
