"""metrics.jsonl where a run goes on: what the checkpoint knows stays, whatever else lies there."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.engine.train.progress import Metrics
from toolkit.errors import UserError


def resumed(folder: Path) -> list[dict[str, object]]:
    """The lines that are left once a run goes on from step 2."""
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    file = folder / "metrics.jsonl"
    Metrics(file, Console(quiet=True), "tiny", (), checkpoint)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_damaged_lines_and_those_of_later_steps_are_dropped(tmp_path: Path) -> None:
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    lines = [json.dumps(line).encode() for line in good]
    foreign = [b"\xff\xfe\x00", b"{}", b"[1]", b'{"step": "2", "loss": 1}', b"", b"[" * 100_000]
    later = json.dumps({"step": 3, "loss": 1.0}).encode()
    text = b"\n".join([foreign[0], lines[0], *foreign[1:], lines[1], later, later[:9]])
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert resumed(tmp_path) == good


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl is no file"):
        resumed(tmp_path)
