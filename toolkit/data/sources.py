"""Local files -> rows: .jsonl, .jsonl.gz, .json, .csv, .parquet, or a glob of them. Streamed, in file order.

Whatever is wrong with a file is one UserError that names the file and the row. Rows count from 1; the row of
a JSONL file is its line, that of a CSV file its record after the header. What a row means is not judged here.
"""

import codecs
import csv
import glob
import gzip
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from toolkit.data import json_stream
from toolkit.errors import UserError

Row = dict[str, Any]

MAX_ROW_BYTES = 8 * 2**20  # some two million tokens: a broken file, or a whole set on one line
_TOO_LONG = f"is longer than {MAX_ROW_BYTES // 2**20} MiB, the most that one row may be. Split or remove it."
_CHUNK = 2**20
# Text of rows packs to a third or a tenth; a bomb to a thousandth.
_MOST_EXPANSION, _SMALL = 100, 4 * 2**20
_FIXES = {
    ".ndjson": " NDJSON is JSON lines: rename it to .jsonl.",
    ".gz": " Of packed files only .jsonl.gz is read: unpack it.",
    ".txt": ' A text has no columns: write one object a line, such as {"messages": [...]}, into a .jsonl.',
}
_MAGIC = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
}


def is_readable(path: str) -> bool:
    """Whether a file of this name is read here, by its suffix."""
    return _suffix(path) is not None


def find_files(path: str, looked_in: str = "") -> list[Path]:
    """The file at `path`, or those that it matches as a glob, sorted.

    Raises UserError where there is none, saying where it was `looked_in`, or one has a suffix that is not read.
    """
    files = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(path, recursive=True)))
    if not files:
        raise UserError(f"No file at {path}{looked_in}. Name a file or a glob ({', '.join(_READERS)}).")
    unread = [file for file in files if not file.is_file() or not is_readable(file.name)]
    if unread:
        names, fix = ", ".join(map(str, unread[:3])), _FIXES.get(unread[0].suffix.lower(), "")
        raise UserError(f"Not a file that can be read: {names}. Allowed: {', '.join(_READERS)}.{fix}")
    return files


def check_folder(path: str) -> None:
    """Raises UserError for a folder in which there is nothing to read."""
    if not any(Path(path).iterdir()):
        raise UserError(f"The folder {path} is empty. Name one with data files ({', '.join(_READERS)}).")


def read_batches(files: Sequence[Path], num_rows: int = 1000) -> Iterator[list[Row]]:
    """Lists of up to `num_rows` rows, all files in one stream; never more than a batch in memory.

    Raises UserError at the first row that cannot be read, or whose columns are not those of the first one.
    """
    batch: list[Row] = []
    for row in read_rows(files):
        batch.append(row)
        if len(batch) == num_rows:
            yield batch
            batch = []
    if batch:
        yield batch


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """One row after the other; errors as in `read_batches`."""
    for _, row in read_numbered(files):
        yield row


def read_numbered(files: Sequence[Path]) -> Iterator[tuple[int, Row]]:
    """Each row with its number in its file; errors as in `read_batches`."""
    columns: frozenset[str] | None = None
    for file in files:
        number = 0
        try:
            for number, row in _READERS[_suffix(file.name) or ".jsonl"](file):
                if not isinstance(row, dict):
                    raise _Broken(number, f"is {_named(row)}, not an object with columns")
                names = frozenset(row)
                columns = columns if columns is not None else names
                if not (names <= columns or names >= columns):
                    raise _Broken(number, _other_columns(names, columns))
                yield number, row
        except _Broken as broken:
            raise UserError(f"{file}, row {broken.number}: {broken}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}, row {number + 1}: cannot be read: {error}") from error
        if not number:
            raise UserError(f"{file}, row 1: there is none, the file is empty. Remove it, or fill it.")


class _Broken(Exception):
    def __init__(self, number: int, problem: str):
        super().__init__(problem)
        self.number = number


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in _READERS if name.lower().endswith(suffix)), None)


def _named(value: Any) -> str:
    names = {list: "a list (a JSON array belongs into a .json file)", str: "a string", type(None): "null"}
    return names.get(type(value), f"the value {value!r}")


def _other_columns(names: frozenset[str], columns: frozenset[str]) -> str:
    got, first = ", ".join(sorted(names)), ", ".join(sorted(columns))
    return f"has {got}, the rows before it {first}. Keep one schema in a set, and mix sets in the recipe."


# Text ----------------------------------------------------------------------------------------------------


def _lines(stream: IO[bytes], max_bytes: float = math.inf) -> Iterator[tuple[int, str]]:
    """Lines with their end, split on "\\n" only: U+2028 and its like are text."""
    number = num_bytes = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        num_bytes += len(line)
        if num_bytes > max_bytes:
            raise _Broken(
                number,
                f"unpacks to more than {_MOST_EXPANSION} times its size. Unpack it and look what it is.",
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            _look_at_start(line)
        if len(line) > MAX_ROW_BYTES:
            raise _Broken(number, _TOO_LONG)
        yield number, _decoded(line, number)


def _look_at_start(start: bytes) -> None:
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise _Broken(
                1, f"the file is {name}, which its name does not say. Rename it or save it as UTF-8."
            )
    if start.lstrip()[:1] == b"<":
        raise _Broken(
            1, "the file is HTML or XML, not data: perhaps a web page was saved. Download it again."
        )


def _decoded(line: bytes, number: int) -> str:
    if b"\0" in line:
        raise _Broken(number, "holds NUL bytes. The file is damaged or not text: write it again.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Broken(number, _not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8."


def _not_json(error: Exception) -> str:
    return f"is not valid JSON: {error}. Perhaps it is cut off: fix or remove it."


def _parsed(decoder: json.JSONDecoder, text: str, number: int) -> Any:
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise _Broken(number, _not_json(error)) from None


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    is_packed = file.name.lower().endswith(".gz")
    max_bytes = max(_SMALL, _MOST_EXPANSION * file.stat().st_size) if is_packed else math.inf
    open_file: Callable[..., Any] = gzip.open if is_packed else open
    decoder = json_stream.Decoder()
    with open_file(file, "rb") as stream:
        for number, line in _lines(stream, max_bytes):
            if line.strip():
                yield number, _parsed(decoder, line, number)


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with file.open("rb") as stream:
        try:
            for number, row in enumerate(json_stream.values(_chunks(stream), MAX_ROW_BYTES), 1):
                yield number, row
        except UnicodeDecodeError as error:
            raise _Broken(number + 1, _not_utf8(error)) from None
        except (ValueError, RecursionError) as error:
            raise _Broken(number + 1, _not_json(error)) from None


def _chunks(stream: IO[bytes]) -> Iterator[str]:
    """The text in pieces. What stands before a byte that is not UTF-8 comes first, so its row is known."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    start = stream.read(_CHUNK)
    _look_at_start(start)
    for chunk in itertools.chain([start], iter(lambda: stream.read(_CHUNK), b""), [b""]):
        try:
            if text := decoder.decode(chunk, final=not chunk):
                yield text
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode("utf-8-sig")
            raise


# CSV and parquet -----------------------------------------------------------------------------------------


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    with file.open("rb") as stream:
        records = csv.reader((line for _, line in _lines(stream)), strict=True)
        header: list[str] | None = None
        while True:
            try:
                values = next(records, None)
            except csv.Error as error:
                raise _Broken(number + 1, f"is not valid CSV: {error}. Is a quote left open?") from None
            except _Broken as broken:
                raise _Broken(number + 1, str(broken)) from None
            if values is None:
                return
            if header is None:
                header = values
                if len(set(header)) < len(header) or not all(header):
                    raise _Broken(1, f"the header names a column twice, or not at all: {', '.join(header)}")
            elif values:  # a blank line is no record
                number += 1
                if len(values) != len(header):
                    raise _Broken(number, f"has {len(values)} fields where the header has {len(header)}.")
                yield number, dict(zip(header, values, strict=True))


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet  # only here: the other formats need no pyarrow

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            is_large = batch.nbytes > MAX_ROW_BYTES
            for i in range(batch.num_rows):
                number += 1
                piece = batch.slice(i, 1)
                if is_large and piece.nbytes > MAX_ROW_BYTES:
                    raise _Broken(number, _TOO_LONG)
                yield number, piece.to_pylist()[0]
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise _Broken(number + 1, f"is not readable as parquet: {' '.join(str(error).split())}") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
