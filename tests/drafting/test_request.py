"""What run_new.py is asked for: mistakes are said together, and before anything heavy is loaded."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_cli import mistake
from toolkit.drafting.request import as_written, parse
from toolkit.errors import UserError

ROWS = ROOT / "recipes/tiny/sft.jsonl"


def test_every_mistake_is_said_at_once_and_without_torch(tmp_path: Path) -> None:
    there = tmp_path / "there.yaml"
    there.touch()
    words = ("--model", "/data/none", "--sft", "gone.jsonl", "--gpu", "rtx409", "--out", there)
    said = mistake("new", *words, light=True)
    for part in (
        "--model /data/none: there is no such folder",
        "--sft gone.jsonl: there is no such file",
        f"{there} is there already",
        "did you mean rtx4090",
    ):
        assert part in said
    assert not there.read_text()


def test_without_rows_there_is_nothing_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no rows: name them with --sft or --dpo"):
        parse("", ["--model", "owner/Name-8B"])
    assert parse("", ["--model", "owner/Name-8B", "--sft", str(ROWS)]).draft.file == tmp_path / "name_8b.yaml"


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("./a b/../rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("*.jsonl", "*.jsonl"),
        (str(ROWS), str(ROWS)),
        ("owner/name", "owner/name"),
    ],
)
def test_a_path_is_written_as_the_recipe_will_find_it(
    path: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_written(path, tmp_path / "mine.yaml") == written
