"""What a run was made from is told by its content, wherever it lies."""

from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from toolkit.engine.base import fingerprint


def test_a_folder_is_told_by_its_files_and_large_ones_by_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(200_000)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "notes.txt").write_text("no part of the model")
    whole = fingerprint.base_model(str(tmp_path), None)
    assert whole["revision"] is None and sorted(whole["files"]) == ["config.json", "model.safetensors"]
    assert all(value.startswith("blake2b:") for value in whole["files"].values())

    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "HEAD_BYTES", 100)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 100)
    before = fingerprint.base_model(str(tmp_path), None)["files"]
    assert before["model.safetensors"].startswith("blake2b-sampled:")
    for changed in (bytearray(b"\1") * 200_000, weights + b"\0"):
        (tmp_path / "model.safetensors").write_bytes(changed)
        now = fingerprint.base_model(str(tmp_path), None)["files"]
        assert fingerprint.combined(now) != fingerprint.combined(before)


def test_the_hub_cache_tells_revision_and_hashes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "models--owner--name", "c" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name, blob in (("config.json", "a" * 40), ("model.safetensors", "b" * 64)):
        (repository / "blobs" / blob).write_text("{}")
        (snapshot / name).symlink_to(repository / "blobs" / blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert fingerprint.base_model("owner/name", None) == {
        "revision": commit,
        "files": {"config.json": f"git-sha1:{'a' * 40}", "model.safetensors": f"sha256:{'b' * 64}"},
    }
    assert fingerprint.base_model("owner/other", None)["files"] == {}


def test_rows_are_told_by_their_ids_in_their_order_however_they_are_stored() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3},
        {"input_ids": [4], "labels": [4], "length": 1},
    ]
    of = fingerprint.rows(datasets.Dataset.from_list(rows))
    halves = [datasets.Dataset.from_list([row]) for row in rows]
    assert fingerprint.rows(datasets.concatenate_datasets(halves)) == of
    assert fingerprint.rows(datasets.Dataset.from_list(rows[::-1]).select([1, 0])) == of
    assert fingerprint.rows(datasets.Dataset.from_list(rows[::-1])) != of
    moved = [
        {"input_ids": [1, 2], "labels": [-100, 2], "length": 3},
        {"input_ids": [3, 4], "labels": [3, 4], "length": 1},
    ]
    assert fingerprint.rows(datasets.Dataset.from_list(moved)) != of
