"""What a run was made from, in a few bytes: the base model's files, the rows as they are trained."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache

from toolkit.doctor.sizes import WEIGHT_FILES
from toolkit.files import digest

WHOLE_BYTES = 2**26  # files up to here are hashed whole: 0.1 s
HEAD_BYTES, SAMPLES, SAMPLE_BYTES = 2**20, 64, 2**16  # of larger ones; 5 MiB of 5.5 GB
SHA256_DIGITS = 64


def base_model(path: str, revision: str | None) -> dict[str, Any]:
    """Revision and file hashes of a base model that was loaded from a folder, or from the Hub's cache.

    The Hub names the blobs of its cache by content: SHA-256 for weights, git's SHA-1 for small files; those names
    are taken. In a folder, small files are hashed whole and weights by size, beginning (names and shapes of the
    tensors) and evenly spread samples: any training changes them all, and 16 GB would take a quarter of a minute.
    """
    folder = Path(path)
    if folder.is_dir():
        return {"revision": None, "files": {file.name: _of_file(file) for file in _files(folder)}}
    config = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(config, str):
        return {"revision": revision, "files": {}}
    snapshot = Path(config).parent
    return {"revision": snapshot.name, "files": {file.name: _of_blob(file) for file in _files(snapshot)}}


def combined(files: dict[str, str]) -> str:
    """One short name for a set of file hashes."""
    return hashlib.blake2b(repr(sorted(files.items())).encode(), digest_size=8).hexdigest()


def rows(prepared: Dataset) -> str:
    """BLAKE2b over the token ids and labels of every row, in their order; about a second for 100M tokens."""
    hashed = hashlib.blake2b(digest_size=16)
    for batch in prepared.with_format("arrow").iter(batch_size=10_000):
        for name in sorted(batch.column_names):
            column = batch[name].combine_chunks()
            if pyarrow.types.is_list(column.type):
                hashed.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                column = column.flatten()
            if pyarrow.types.is_string(column.type):
                hashed.update("\0".join(column.to_pylist()).encode())
                continue
            hashed.update(column.to_numpy(zero_copy_only=False).tobytes())
    return hashed.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(WEIGHT_FILES) and file.is_file())


def _of_blob(file: Path) -> str:
    blob = file.resolve()
    if blob == file:  # a cache without symbolic links holds copies
        return _of_file(file)
    return f"{'sha256' if len(blob.name) == SHA256_DIGITS else 'git-sha1'}:{blob.name}"


def _of_file(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_BYTES:
        return f"blake2b:{digest(file)}"
    hashed = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        hashed.update(stream.read(HEAD_BYTES))
        for index in range(SAMPLES):
            stream.seek(size * index // SAMPLES)
            hashed.update(stream.read(SAMPLE_BYTES))
    return f"blake2b-sampled:{hashed.hexdigest()}"
