"""Sets that are plainly wrong, as a user meets them: one message, exit 2, before anything heavy is loaded."""

import json
from pathlib import Path

import pytest

from tests.data.test_sources import MALFORMED, write
from tests.test_cli import mistake
from toolkit.data import sets
from toolkit.errors import UserError
from toolkit.recipe.load import load

KINDS = {  # one of each kind of damage; test_sources.py has them all
    "truncated JSON": ("a.jsonl", "not valid JSON", 3),
    "wrong encoding": ("a.jsonl", "not UTF-8 (byte 0xe9)", 4),
    "empty": ("a.jsonl", "the file is empty", 1),
    "mixed schemas": ("a.jsonl", "has conversations, the rows before it", 3),
    "a 10 MB row": ("a.jsonl", "longer than 8 MiB", 2),
    "HTML": ("a.jsonl", "HTML", 1),
    "NUL bytes": ("a.jsonl", "NUL bytes", 2),
    "ragged CSV": ("a.csv", "has 3 fields where the header has 2", 2),
    "no parquet": ("a.parquet", "parquet", 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_malformed_file_stops_before_anything_heavy_is_loaded(kind: str, tmp_path: Path) -> None:
    name, words, row = KINDS[kind]
    content = next(c for n, c, r, w in MALFORMED if (n, r) == (name, row) and (w in words or words in w))
    file = write(tmp_path / name, content)
    settings = ("--set", f"sft.datasets.0.path={file}", "--set", "sft.eval_datasets=[]")
    said = mistake("sft", "--recipe", "tiny", *settings, "--runs", tmp_path / "runs", light=True)
    assert said.count("error:") == 1 and f"{file}, row {row}: " in said and words in said
    assert not (tmp_path / "runs").exists()


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", json.dumps({"instruction": "q", "output": "a"}) + "\n")
    strange = write(tmp_path / "strange.jsonl", json.dumps({"x": 1}) + "\n")
    paths = [{"path": str(path)} for path in (good, strange, tmp_path / "none.jsonl")]
    paths += [{"path": str(good), "schema": "alpacca"}, {"path": str(good), "filter": "score >"}]
    recipe = load("tiny", (f"sft.datasets={json.dumps(paths)}", "sft.eval_datasets=[]"))
    found = sets.problems(recipe, recipe.section("sft"), "chat")
    words = ("fit no chat schema", "No file at", "Did you mean alpaca?", "is not understood")
    assert len(found) == 4 and all(word in problem for word, problem in zip(words, found, strict=True))
    good = load("tiny", (f"sft.datasets={json.dumps(paths[:1])}", "sft.eval_datasets=[]"))
    assert sets.problems(good, good.section("sft"), "chat") == []


def test_only_local_files_are_read_here(tmp_path: Path) -> None:
    recipe = load("tiny", ('sft.datasets=[{path: owner/name}, {path: "none/*.csv"}]', "sft.eval_datasets=[]"))
    assert recipe.sft
    hub, local = recipe.sft.datasets
    assert not sets.is_local_file(recipe, hub) and sets.is_local_file(recipe, local)
    assert len(sets.problems(recipe, recipe.section("sft"), "chat")) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("datasets", "[{path: a, weight: 1.0}, {path: b}]"),
        ("datasets", "[{path: a, weight: 1.0}]"),
        ("eval_datasets", "[{path: a, weight: 1.0}]"),
    ],
)
def test_a_weight_is_a_share_of_a_mix(field: str, value: str) -> None:
    with pytest.raises(UserError, match="weight"):
        load("tiny", (f"sft.{field}={value}",))
    with pytest.raises(UserError, match="greater than 0"):
        load("tiny", ("sft.datasets=[{path: a, weight: 0.0}, {path: b, weight: 1.0}]",))


@pytest.mark.parametrize(
    ("name", "said"), [("rows.txt", "A text has no columns"), ("none.jsonl", "No file at"), ("", "is empty")]
)
def test_a_path_of_this_machine_is_no_id_of_the_hub(name: str, said: str, tmp_path: Path) -> None:
    if name == "rows.txt":
        write(tmp_path / name, "x")
    recipe = load("tiny", (f"sft.datasets=[{{path: {tmp_path / name}}}]", "sft.eval_datasets=[]"))
    [found] = sets.problems(recipe, recipe.section("sft"), "chat")
    assert said in found


def test_an_absolute_glob_beside_brackets_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "[x]"
    folder.mkdir()
    write(folder / "a.jsonl", json.dumps({"instruction": "q", "output": "a"}) + "\n")
    pattern = tmp_path / "[[]x]" / "*.jsonl"
    recipe = load("tiny", (f"sft.datasets=[{{path: '{pattern}'}}]", "sft.eval_datasets=[]"))
    assert sets.problems(recipe, recipe.section("sft"), "chat") == []
