"""Reference log-probs on disk: a kill costs one batch of the pass, and a run that differs only in beta, learning rate,
schedule or the like finds all of them again.

An entry is one file in ~/.cache/finetune-toolkit/reference (or under XDG_CACHE_HOME), named by everything that decides
its values; it may be deleted at any time. It holds the batches of one pass in their order, each with a checksum.

Batches are kept, not pairs: in bf16 a log-prob also depends on the batch that it was computed in (on the tiny recipe
by 0.007 nats on average and up to 0.1), and the same key must mean the same bits. So an entry belongs to a whole set of
pairs and a batch size; another selection of rows is another entry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape

from toolkit import env, files
from toolkit.engine.base.model import device_name
from toolkit.run import caches, manifest

CODE = ("precompute.py", "cache.py")
ENTRIES = 50  # the newest stay; 40,000 pairs take 0.3 MB
BLOCK = 4096  # bytes that are summed into one number of a fingerprint
# Pairs before this batch, pairs in it, pairs that fitted at once, CRC-32 of these and the values.
_HEAD = struct.Struct("<4I")


@dataclass(frozen=True, eq=False)
class Batch:
    """Two log-probs of each row of a batch, (rows,) each, fp32: of a pair, chosen and rejected. `fitting` rows had room
    (the last has fewer)."""

    fitting: int
    first: np.ndarray
    second: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


class Entry:
    """The batches of one pass, those that an earlier one left and those that are appended."""

    def __init__(self, stream: BinaryIO | None, num_pairs: int, console: Console):
        self._stream, self._console = stream, console
        self.batches, whole = decode(stream.read() if stream else b"", num_pairs)
        if stream:
            stream.truncate(whole)
            stream.seek(whole)

    def append(self, batch: Batch) -> None:
        """Adds a batch; it is on disk when this returns. A disk that is full ends the keeping, not the pass."""
        before = sum(map(len, self.batches))
        self.batches.append(batch)
        if self._stream is None:
            return
        try:
            record = encode(batch, before)
            if self._stream.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._stream = None
            _say_not_kept(error, self._console)

    def forget(self) -> None:
        """Drops all batches."""
        self.batches = []
        if self._stream:
            self._stream.seek(0)
            self._stream.truncate()


@contextlib.contextmanager
def opened(key: str, num_pairs: int, console: Console) -> Iterator[Entry]:
    """The entry of that name, held by this process. One that another process holds, or a folder that cannot be
    written, gives an empty entry that is kept nowhere, and a message."""
    with contextlib.ExitStack() as until_done:
        entry = Entry(None, num_pairs, console)
        try:
            folder().mkdir(parents=True, exist_ok=True)
            _file(key).touch()  # the newest stay
            stream = until_done.enter_context(_file(key).open("r+b", buffering=0))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
            entry = Entry(stream, num_pairs, console)
            _prune()
        except BlockingIOError:
            console.print(
                "[yellow]another process is computing the same reference log-probs: this run computes its own[/]"
            )
        except OSError as error:
            _say_not_kept(error, console)
        yield entry


def delete(keys: list[str]) -> None:
    """Removes entries that turned out wrong."""
    for key in keys:
        with contextlib.suppress(OSError):
            _file(key).unlink()


def encode(batch: Batch, before: int) -> bytes:
    """A record: head, first, second. `before` pairs of the pass stand in the records ahead of it."""
    values = np.stack([batch.first, batch.second]).astype("<f4").tobytes()
    crc = zlib.crc32(values, zlib.crc32(_HEAD.pack(before, len(batch), batch.fitting, 0)))
    return _HEAD.pack(before, len(batch), batch.fitting, crc) + values


def decode(data: bytes, num_pairs: int) -> tuple[list[Batch], int]:
    """(the batches up to the first record that is torn, damaged or out of place, the bytes they take)."""
    batches: list[Batch] = []
    place = done = 0
    while place + _HEAD.size <= len(data):
        before, count, fitting, _ = _HEAD.unpack_from(data, place)
        end = place + _HEAD.size + 8 * count
        if before != done or not 0 < count <= min(fitting, num_pairs - done) or end > len(data):
            break
        values = np.frombuffer(data, "<f4", 2 * count, place + _HEAD.size)
        batch = Batch(fitting, values[:count], values[count:])
        if encode(batch, before) != data[place:end]:
            break
        batches.append(batch)
        place, done = end, done + count
    return batches, place


def key_of(facts: dict[str, Any], pairs: Iterable[bytes], batch_size: int) -> str:
    """Names what decides the values: `facts`, the pairs in the order they are computed in, and the batch size."""
    text = json.dumps([facts, batch_size], sort_keys=True, default=_plain)
    hashed = hashlib.blake2b(text.encode(), digest_size=16)
    for pair in pairs:
        hashed.update(pair)
    return hashed.hexdigest()


def digests(rows: Dataset, ids: Iterable[str]) -> list[bytes]:
    """16 bytes for each row that stand for its token ids, of these columns."""
    found = []
    columns = rows.select_columns(list(ids)).with_format("numpy")
    for some in columns.iter(1000):
        for parts in zip(*some.values(), strict=True):
            hashed = hashlib.blake2b(digest_size=16)
            for part in parts:
                hashed.update(struct.pack("<I", len(part)) + np.asarray(part, "<i4").tobytes())
            found.append(hashed.digest())
    return found


def facts_of(model: Any, adapter: str, pad_token_id: int) -> dict[str, Any]:
    """Everything but pairs and batch size: weights as they lie in memory, LoRA scaling, configuration, versions,
    device, and the code that computes. The weights speak for path, revision and quantisation of the base."""
    state, lora = model.state_dict(), model.peft_config
    of_adapter = {name for name in state if f".{adapter}." in f"{name}."}
    of_others = {name for name in state for other in lora if other != adapter and f".{other}." in f"{name}."}
    config = model.config.to_dict() | {"_attn_implementation": model.config._attn_implementation}
    return {
        "base": fingerprint({name: state[name] for name in state.keys() - of_adapter - of_others}),
        "adapter": fingerprint({name: state[name] for name in of_adapter}),
        "lora": {key: value for key, value in lora[adapter].to_dict().items() if "base_model" not in key},
        "config": {key: value for key, value in config.items() if key != "_name_or_path"},
        "pad_token_id": pad_token_id,
        "environment": {
            name: os.environ.get(name) for name in (env.LOSS_CHUNK_VARIABLE, "UNSLOTH_BLOCK_COMPILE")
        },
        "device": _device(),
        "packages": manifest.packages(),
        "code": [files.digest(Path(__file__).with_name(name)) for name in CODE],
    }


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names, types, shapes and contents: sums over blocks, taken where the tensors are (reading 5.5 GB back
    from a card would take seconds), hashed here."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        if data.storage_offset() % 8:
            data = data.clone()
        whole = len(data) // BLOCK * BLOCK
        sums = data[:whole].view(torch.int64).view(-1, BLOCK // 8).sum(1)
        hashed.update(sums.cpu().numpy().tobytes())
        hashed.update(data[whole:].cpu().numpy().tobytes())
    return hashed.hexdigest()


def folder() -> Path:
    return caches.log_probs()


def _file(key: str) -> Path:
    return folder() / f"{key}{caches.LOG_PROBS}"


def _prune() -> None:
    """Deletes all but the newest entries. One in use is among those, or else is written to its end unseen."""
    with contextlib.suppress(FileNotFoundError):  # another process prunes too
        for path in sorted(folder().glob(f"*{caches.LOG_PROBS}"), key=lambda path: path.stat().st_mtime)[
            :-ENTRIES
        ]:
            path.unlink()


def _device() -> list[Any]:
    """What chooses the kernels: the card, or the CPU's instructions and how many threads share the work."""
    if torch.cuda.is_available():
        return [device_name()]
    return [device_name(), torch.get_num_threads(), torch.cpu.get_capabilities()]


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _say_not_kept(error: OSError, console: Console) -> None:
    console.print(
        f"[yellow]reference log-probs are not kept in {escape(f'{folder()} ({error.strerror or error})')}: "
        "if this run is killed, their pass starts again[/]"
    )
