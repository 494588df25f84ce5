"""Preparation on rows made here and a small tokenizer: every row accounted for, cached, the same however it is run."""

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.engine.conftest import held_out_pairs
from tests.small_tokenizers import byte_level
from toolkit import env
from toolkit.data.masking import IGNORE_INDEX, Masking
from toolkit.data.template import ChatTemplate, read_template
from toolkit.engine.data import cache as row_cache
from toolkit.engine.data import preparation
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.records.data_report import DataReport

QUIET = Console(quiet=True)
CHATS = [{"instruction": f"the question {i}", "output": f"the answer {i}"} for i in range(40)]
PAIRS = [{"prompt": f"the {i // 2}", "chosen": f"an apple {i}", "rejected": f"x {i}"} for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune-toolkit" / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(stage: str, *sources: Any, **values: Any) -> Recipe:
    """The tiny recipe on other sets; `sources` are paths, or whole entries of `datasets`."""
    entries = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    values = {"datasets": entries, "eval_datasets": [], "max_dropped_fraction": 1.0} | values
    return load("tiny", tuple(f"{stage}.{key}={json.dumps(value)}" for key, value in values.items()))


def loaded(source: str | None = None) -> Any:
    template = ChatTemplate(
        source or read_template(ROOT / "recipes/templates/llama3.jinja"), "<|begin_of_text|>"
    )
    tokenizer = SimpleNamespace(backend_tokenizer=byte_level())
    return SimpleNamespace(
        tokenizer=tokenizer, template=template, end_of_turn="<|eot_id|>"
    )  # no model at all


def prepare(recipe: Recipe, stage: str = "sft", **more: Any) -> preparation.Prepared:
    section, kind = recipe.section(stage), stages.of(stage).row_kind
    return preparation.prepare(
        recipe, section, kind, more.pop("loaded", loaded()), more.pop("console", QUIET)
    )


def decoded(ids: list[int]) -> str:
    return byte_level().decode(ids, skip_special_tokens=False)


def answers(rows: Any) -> list[str]:
    return [
        decoded([i for i in row["labels"] if i != IGNORE_INDEX]).removesuffix("<|eot_id|>") for row in rows
    ]


# Every row ------------------------------------------------------------------------------------------------------


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    bad = [
        {"instruction": "q", "output": ""},
        {"instruction": "q", "output": True},
        {"instruction": "q", "output": ""},
    ]
    rows = [*CHATS[:3], *bad, *CHATS[2:]]
    result = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", rows), eval_rows=5))
    report = result.report
    assert report.dropped == {"empty_reply": 2, "wrong_type": 1}
    assert report.first_rows == {"empty_reply": [4, 6], "wrong_type": [5]}
    for side in (report, report.eval):
        assert side.used + sum(side.dropped.values()) == side.read
        assert side.selection[-1].after == side.read
        for before, after in zip(side.selection, side.selection[1:], strict=False):
            assert before.after == after.before
    assert [step.step for step in report.selection] == [
        f"read {tmp_path / 'a.jsonl'}",
        "deduplicate",
        "shuffle with seed 3407",
        "hold out 5 by prompt: the rest",
    ]
    assert report.selection[0].before == len(rows) and report.selection[1].after == len(rows) - 1
    assert report.used + report.eval.used == 40 and report.eval.used == 5
    assert result.eval is not None
    assert sorted(answers(result.train) + answers(result.eval)) == sorted(row["output"] for row in CHATS)
    report.write(tmp_path / "data_report.json")
    assert DataReport.load(tmp_path / "data_report.json") == report


def test_columns_are_int32_on_disk(tmp_path: Path, cache: Path) -> None:
    chats = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))).train
    pairs = prepare(recipe_of("dpo", write(tmp_path / "b.jsonl", PAIRS)), "dpo").train
    assert chats.column_names == ["input_ids", "labels", "length"]
    assert pairs.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "length"]
    for rows in (chats, pairs):
        assert {str(field.type) for field in rows.features.arrow_schema} == {"list<item: int32>", "int32"}
        assert all(Path(file["filename"]).is_relative_to(cache) for file in rows.cache_files)
    assert chats[0]["length"] == len(chats[0]["input_ids"])
    longest = max(len(pairs[0]["chosen_ids"]), len(pairs[0]["rejected_ids"]))
    assert pairs[0]["length"] == len(pairs[0]["prompt_ids"]) + longest


def test_too_many_dropped_rows_stop_with_the_table_also_from_the_cache(tmp_path: Path) -> None:
    rows = [*CHATS[:8], {"instruction": "q", "output": ""}, {"instruction": "r", "output": ""}]
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", rows), max_dropped_fraction=0.1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"(?s)2 of 10 rows \(20.0%\).*empty_reply.*rows 9, 10"):
            prepare(recipe)
    allowed = recipe_of("sft", tmp_path / "a.jsonl", max_dropped_fraction=0.2)
    assert prepare(allowed).report.used == 8


def test_nothing_to_train_on_stops(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}] * 3)
    with pytest.raises(UserError, match="No row of 3 can be trained on"):
        prepare(recipe_of("sft", file))
    with pytest.raises(UserError, match="No row of"):
        prepare(recipe_of("sft", write(tmp_path / "b.jsonl", CHATS), max_length=8, overlong="cut"))
    with pytest.raises(UserError, match="no rows"):
        prepare(recipe_of("sft", {"path": str(tmp_path / "b.jsonl"), "filter": "output == 'none'"}))


def test_a_suggestion_when_most_of_max_length_is_never_used(tmp_path: Path) -> None:
    report = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS), max_length=2048)).report
    assert "max_length 64 holds them all (now 2048)" in report.suggestion


# Selection and mixing -------------------------------------------------------------------------------------------


def test_leaks_are_counted_removed_and_shown(tmp_path: Path) -> None:
    held_out = write(tmp_path / "eval.jsonl", [*CHATS[:4], {"instruction": "new", "output": "new"}])
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS), eval_datasets=[{"path": str(held_out)}])
    console = Console(record=True, width=120, file=io.StringIO())
    result = prepare(recipe, console=console)
    assert result.report.eval.leaks == 4
    assert result.eval is not None and answers(result.eval) == ["new"]
    assert "4 held-out rows also stand in training and were taken out" in console.export_text()


def test_no_prompt_of_a_pair_is_on_both_sides(tmp_path: Path) -> None:
    recipe = recipe_of("dpo", write(tmp_path / "a.jsonl", PAIRS), eval_rows=10)
    result = prepare(recipe, "dpo")
    assert result.eval is not None
    sides = [{tuple(row["prompt_ids"]) for row in side} for side in (result.train, result.eval)]
    assert len(sides[0]) == 15 and len(sides[1]) == 5 and not sides[0] & sides[1]
    held_out = held_out_pairs(recipe, loaded())
    assert [pair.chosen_ids for pair in held_out] == [row["chosen_ids"] for row in result.eval]
    assert held_out_pairs(recipe_of("dpo", tmp_path / "a.jsonl"), loaded()) == []


def test_sets_are_mixed_by_weight_or_by_rows_each_with_its_schema(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", CHATS)
    chats = [
        {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"o{i}"}]}
        for i in range(30)
    ]
    two = write(tmp_path / "two.jsonl", [*chats, {"messages": []}])

    def taken(**values: Any) -> Counter[str]:
        sources = [{"path": str(one)} | values.get("one", {}), {"path": str(two)} | values.get("two", {})]
        result = prepare(recipe_of("sft", *sources, max_rows=values.get("max_rows")))
        assert result.report.used == len(result.train)
        return Counter(answer[0] for answer in answers(result.train))

    assert taken() == {"t": 40, "o": 30}
    assert taken(one={"rows": 7}, two={"rows": 5}) == {"t": 7, "o": 5}
    assert taken(one={"weight": 3.0}, two={"weight": 1.0}) == {"t": 40, "o": 13}
    assert taken(one={"weight": 1.0}, two={"weight": 3.0}, max_rows=16) == {"t": 4, "o": 12}
    report = prepare(recipe_of("sft", one, two)).report
    assert report.first_rows == {"no_turns": [f"{two}:31"]}
    assert report.read == 71 and report.used == 70


def test_a_filter_and_top_k_come_before_duplicates_and_rows(tmp_path: Path) -> None:
    rows = [{**row, "score": i % 5} for i, row in enumerate([*CHATS, *CHATS])]
    source = {"path": str(write(tmp_path / "a.jsonl", rows)), "filter": "score >= 3", "rows": 4}
    report = prepare(recipe_of("sft", source)).report
    assert [(s.step, s.after) for s in report.selection][1:4] == [
        ("filter score >= 3", 4),  # reading stopped at the fourth
        ("deduplicate", 4),
        ("first 4", 4),
    ]
    source = {"path": str(tmp_path / "a.jsonl"), "top_k": {"column": "score", "rows": 16}}
    assert prepare(recipe_of("sft", source)).report.read == 8
    with pytest.raises(UserError, match="names the column 'rating'; its columns: instruction, output, score"):
        prepare(recipe_of("sft", source | {"filter": "rating > 1"}))


# However it is run ----------------------------------------------------------------------------------------------


def test_batches_of_any_size_give_the_same_rows(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [{"instruction": "q", "output": value} for value in ("", None, True)]
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", [*CHATS, *bad] * 3), eval_rows=6, deduplicate=False)
    at_once = prepare(recipe)
    shutil.rmtree(cache)
    monkeypatch.setattr(preparation, "BATCH", 7)
    in_parts = prepare(recipe)
    assert in_parts.report == at_once.report
    assert in_parts.train[:] == at_once.train[:] and in_parts.eval[:] == at_once.eval[:]  # type: ignore[index]


def test_however_many_rows_no_process_is_started_that_a_kill_could_leave_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": str(i), "output": "a"} for i in range(10_000)]
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", rows))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert prepare(recipe).report.used == 10_000


def test_the_tokenizer_has_all_cores_while_it_encodes_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize, seen = Masking.tokenize, []

    def watched(self: Masking, kind: Any, items: Any) -> Any:
        seen.append(os.environ[env.TOKENIZER_THREADS])
        return tokenize(self, kind, items)

    monkeypatch.setattr(Masking, "tokenize", watched)
    monkeypatch.setattr(env, "_exported_threads", None)
    monkeypatch.setenv(env.TOKENIZER_THREADS, "false")  # as Unsloth's import leaves it
    prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS)))
    assert seen == ["true"] and os.environ[env.TOKENIZER_THREADS] == "false"


def test_the_rows_do_not_depend_on_the_device() -> None:
    """One code path: what prepares rows asks neither torch nor the model (there is none in these tests)."""
    for module in (preparation, row_cache, preparation.read_sets):
        file = Path(sys.modules[getattr(module, "__module__", module.__name__)].__file__ or "")
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        imports = {
            a.name
            for n in ast.walk(ast.parse(file.read_text()))
            if isinstance(n, ast.Import)
            for a in n.names
        }
        assert not {"torch", "cuda"} & (names | imports)


def test_packing_keeps_rows_whole_with_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.engine.train import sft

    rows = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))).train
    assert sft.packed(rows, 128, QUIET) is rows  # the CPU backend pads
    monkeypatch.setattr(sft.torch.cuda, "is_available", lambda: True)
    pieces = []
    for sequence in sft.packed(rows, 128, QUIET):
        assert sum(sequence["seq_lengths"]) == len(sequence["input_ids"]) == sequence["length"] <= 128
        at = 0
        for length in sequence["seq_lengths"]:
            pieces.append((sequence["input_ids"][at : at + length], sequence["labels"][at : at + length]))
            at += length
    assert sorted(pieces) == sorted((row["input_ids"], row["labels"]) for row in rows)


# The cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every preparation that is really done."""
    done, encode = [], preparation.encode
    monkeypatch.setattr(preparation, "encode", lambda *args: (done.append(args[1]), encode(*args))[1])
    return done


def test_only_what_decides_the_rows_prepares_again(tmp_path: Path, encoded: list[str]) -> None:
    file = write(tmp_path / "a.jsonl", PAIRS)
    first = prepare(recipe_of("dpo", file), "dpo")
    for same in ({}, {"beta": 0.3}, {"learning_rate": 1e-6}, {"max_dropped_fraction": 0.5}):
        again = prepare(recipe_of("dpo", file, **same), "dpo")
        assert again.train[:] == first.train[:] and again.report == first.report
    assert len(encoded) == 1
    for number, other in enumerate(({"max_length": 255}, {"max_rows": 9}, {"system_turn": "merge"}), 2):
        prepare(recipe_of("dpo", file, **other), "dpo")
        assert len(encoded) == number
    template = loaded().template.source.replace(r"\n\n", r"\n")
    prepare(recipe_of("dpo", file), "dpo", loaded=loaded(template))
    assert len(encoded) == 5
    write(file, [*PAIRS, {"prompt": "one", "chosen": "more", "rejected": "row"}])
    assert prepare(recipe_of("dpo", file), "dpo").report.used == 41
    assert len(encoded) == 6


def test_code_that_decides_is_part_of_the_key() -> None:
    """Whatever the preparation imports of the toolkit decides rows, unless it is named here."""
    others = {
        "errors",
        "recipe/schema",
        "recipe/stages",
        "recipe/yaml_file",
        "engine/base/hub",
        "engine/base/model",
        "engine/base/quiet",
        "console/screen",
        "env",
        "files",
        "records/data_report",
        "run/caches",
        "run/sealing",
    }
    seen, todo = set(), ["engine/data/preparation"]
    while todo:
        module = todo.pop()
        if module in seen or module in others:
            continue
        seen.add(module)
        for node in ast.walk(ast.parse((ROOT / "toolkit" / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
                inside = (node.module or "").removeprefix("toolkit").removeprefix(".").replace(".", "/")
                for name in [inside, *(f"{inside}/{alias.name}".lstrip("/") for alias in node.names)]:
                    if name and (ROOT / "toolkit" / f"{name}.py").is_file():
                        todo.append(name)
    assert seen == set(row_cache.CODE.split())


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "index"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, encoded: list[str], damage: str) -> None:
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))
    before = prepare(recipe).train[:]
    [entry] = cache.iterdir()
    [rows] = (entry / "train").glob("*.arrow")
    content = rows.read_bytes()
    if damage == "remove":
        rows.unlink()
    elif damage == "index":
        (entry / row_cache.INDEX).write_text('{"facts": {')
    else:
        flipped = content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:]
        rows.write_bytes(content[: len(content) // 2] if damage == "cut" else flipped)
    assert prepare(recipe).train[:] == before
    assert len(encoded) == 2 and [path.name for path in cache.iterdir()] == [entry.name]


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))
    code = (
        "import os, signal, sys, tests.conftest; os.environ['XDG_CACHE_HOME'] = sys.argv[1]\n"
        "from pathlib import Path; from tests.engine.data.test_preparation import prepare, preparation, recipe_of\n"
        "encode = preparation.encode\n"
        "preparation.encode = lambda *args: (encode(*args), os.kill(os.getpid(), signal.SIGKILL))[0]\n"
        "prepare(recipe_of('sft', Path(sys.argv[2])))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "cache"), str(tmp_path / "a.jsonl")]
    killed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name.startswith(".making-") for path in cache.iterdir()] == [True]
    assert prepare(recipe).report.used == 40
    [leftover] = cache.glob(".making-*")
    os.utime(leftover, (0, 0))
    prepare(recipe_of("sft", tmp_path / "a.jsonl", max_length=99))
    assert not leftover.exists()


def test_an_entry_says_when_it_was_last_used(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))
    prepare(recipe)
    [entry] = cache.iterdir()
    os.utime(entry, (0, 0))
    prepare(recipe)
    assert entry.stat().st_mtime > 0


def test_only_files_that_an_entry_names_are_read_and_none_is_added(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))
    before = prepare(recipe).train[:]
    [entry] = cache.iterdir()
    [rows] = (entry / "train").glob("*.arrow")
    shutil.copy(rows, rows.with_name("rows-more.arrow"))
    again = prepare(recipe).train
    assert again[:] == before
    files = sorted(entry.rglob("*"))
    again.select([2, 1, 0]).add_column("more", [1, 2, 3])
    again.map(lambda row: row)
    assert sorted(entry.rglob("*")) == files


def test_facts_of_an_entry_that_were_changed_are_not_told(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))
    prepare(recipe)
    [entry] = cache.iterdir()
    index = (entry / row_cache.INDEX).read_text()
    (entry / row_cache.INDEX).write_text(index.replace('"read": 40', '"read": 41'))
    assert prepare(recipe).report.read == 40


def test_a_file_that_changes_while_it_is_read_is_not_kept_under_its_old_hash(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read_sets = write(tmp_path / "a.jsonl", CHATS), preparation.read_sets
    recipe, text = recipe_of("sft", file), file.read_text()

    def edited(*args: Any) -> Any:
        file.write_text(text.replace("answer", "ANSWER"))
        found = read_sets(*args)
        file.write_text(text)  # as before: the hash alone would not tell
        return found

    monkeypatch.setattr(preparation, "read_sets", edited)
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read"):
        prepare(recipe)
    assert not list(cache.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not any("ANSWER" in answer for answer in answers(prepare(recipe).train))


@pytest.mark.parametrize("theirs", ["complete", "damaged"])
def test_an_entry_that_another_process_makes_in_the_same_moment_is_taken_if_it_is_complete(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    rename, inodes = Path.rename, []

    def overtaken(made: Path, target: Path) -> Path:
        if target.parent == cache and not inodes:
            shutil.copytree(made, target)
            inodes.append(target.stat().st_ino)
            if theirs == "damaged":
                next(target.glob("train/*.arrow")).write_bytes(b"")
        return rename(made, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))).report.used == 40
    [entry] = cache.iterdir()
    assert (entry.stat().st_ino == inodes[0]) == (theirs == "complete"), "a reader may have it open"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="point XDG_CACHE_HOME at a volume with room"):
        prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS)))


# Folders and the Hub --------------------------------------------------------------------------------------------


def test_folders_saved_or_of_files_give_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    expected = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", CHATS))).train[:]
    rows = Dataset.from_list(CHATS)
    rows.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"fit": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train-00000.parquet")
    sources: list[Any] = [
        tmp_path / "saved",
        {"path": str(tmp_path / "splits"), "split": "fit"},
        tmp_path / "folder",
    ]
    for source in sources:
        assert prepare(recipe_of("sft", source)).train[:] == expected
    assert prepare(recipe_of("sft", tmp_path / "folder", max_rows=5)).report.used == 5  # streamed
    with pytest.raises(UserError, match="has no split 'train'; it has: fit"):
        prepare(recipe_of("sft", tmp_path / "splits"))
    with pytest.raises(UserError, match=r'folder cannot be read: Unknown split "test"'):
        prepare(recipe_of("sft", {"path": str(tmp_path / "folder"), "split": "test"}))
    with pytest.raises(UserError, match="cannot be read: BuilderConfig 'other' not found"):
        prepare(recipe_of("sft", {"path": str(tmp_path / "folder"), "name": "other"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        prepare(recipe_of("sft", tmp_path / "empty"))


def test_a_set_of_the_hub_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for values in ({}, {"max_rows": 5}):
        with pytest.raises(UserError) as error:
            prepare(recipe_of("sft", "nobody/nothing", **values))
        assert "data set nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set" in str(
            error.value
        )


def test_half_a_character_in_any_column_costs_at_most_its_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**CHATS[0], "source": "\ud800"},
        {"instruction": "a \ud800", "output": "b"},
    ]
    rows += [{"instruction": "no reply", "output": None, "source": "\udfff"}]
    report = prepare(recipe_of("sft", write(tmp_path / "a.jsonl", rows))).report
    assert report.used == 1 and report.dropped == {"broken_text": 1, "missing_content": 1}


def test_columns_that_mean_something_and_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [{**row, "weight": 0.5, "tools": None} for row in CHATS]
    console = Console(file=io.StringIO(), width=200)
    recipe = recipe_of("sft", write(tmp_path / "a.jsonl", rows))
    report = preparation.prepare(recipe, recipe.section("sft"), "chat", loaded(), console).report
    assert "columns that are not read of" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [step.step for step in report.selection if step.step.endswith(": weight")]
