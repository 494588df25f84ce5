import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.data.json_stream import Repeated
from toolkit.data.reasons import Reason
from toolkit.data.rows import to_item, to_messages
from toolkit.data.sources import MAX_ROW_BYTES, find_files, read_batches, read_rows
from toolkit.errors import UserError

ROWS = [{"instruction": f"q{i}", "output": "é\u2028 line"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_of(rows: list[dict]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.rstrip("\n")),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\n")),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.JSONL", LINES),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.json", "\ufeff \n" + json.dumps(ROWS)),
        ("a.json", LINES),  # many .json files on the Hub are JSONL
        ("a.csv", csv_of(ROWS)),
        ("a.csv", "\ufeff" + csv_of(ROWS).replace("\n", "\r\n") + "\r\n\r\n"),
    ],
)
def test_good_files(tmp_path, name, content):
    assert list(read_rows([write(tmp_path / name, content)])) == ROWS


def test_parquet_with_nested_rows(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "score": i / 2} for i in range(1000)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert list(read_rows([tmp_path / "a.parquet"])) == rows


def test_quoted_csv(tmp_path):
    file = write(tmp_path / "a.csv", 'instruction,output\n"a, ""b""\nc",d\n')
    assert list(read_rows([file])) == [{"instruction": 'a, "b"\nc', "output": "d"}]


def test_json_split_at_every_character(tmp_path, monkeypatch):
    rows = [{"a": 'x"\\é\u2028\ud83d', "b": [1.5e3, True, None, {}]}, {"a": "", "b": -12}]
    file = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    wide = write(tmp_path / "b.json", json.dumps([{"a": "é😀" * 9}], ensure_ascii=False))
    for chunk in range(1, 40):
        monkeypatch.setattr("toolkit.data.sources._CHUNK", chunk)
        assert list(read_rows([file])) == rows
        assert list(read_rows([wide])) == [{"a": "é😀" * 9}]


def test_batches_and_globs(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    files = find_files(str(tmp_path / "*.jsonl"))
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    batches = list(read_batches(files, num_rows=4))
    assert [[row["text"] for row in batch] for batch in batches] == [["a1", "a2", "b1", "b2"], ["c1", "c2"]]


def test_a_row_may_lack_columns_or_have_more(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n{"a": 1, "b": 2, "c": 3}\n')
    assert len(list(read_rows([file]))) == 3


@pytest.mark.parametrize("path", ["none.jsonl", "*.jsonl", "a.txt", "folder"])
def test_nothing_to_read(tmp_path, path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"\.jsonl, \.jsonl\.gz, \.json, \.csv, \.parquet"):
        find_files(str(tmp_path / path))


# Malformed files -----------------------------------------------------------------------------------------

GOOD = '{"text": "a"}\n'
BIG = json.dumps({"text": "x" * 10_000_000})
HTML = "<!DOCTYPE html>\n<html><body>404</body></html>"
ALPACA, CHATS = '{"instruction": "q", "output": "a"}\n', '{"conversations": []}\n'
LATIN = '{"text": "caf\u00e9"}\n'.encode("latin-1")

MALFORMED = [
    ("a.jsonl", GOOD * 2 + '{"text": "b', 3, "not valid JSON"),  # truncated
    ("a.jsonl", GOOD + "{'text': 'a'}\n" + GOOD, 2, "not valid JSON"),
    ("a.jsonl", GOOD + '{"text": "a"} {"text": "b"}\n', 2, "not valid JSON"),
    ("a.jsonl", GOOD + "null\n", 2, "is null, not an object"),
    ("a.jsonl", GOOD + "\n" + '["a"]\n', 3, "is a list"),
    ("a.jsonl", GOOD + "42\n", 2, "the value 42"),
    ("a.jsonl", '"text"\n', 1, "is a string"),
    ("a.jsonl", json.dumps([{"text": "a"}]), 1, "belongs into a .json file"),
    ("a.jsonl", GOOD.encode() * 3 + LATIN, 4, "not UTF-8 (byte 0xe9)"),
    ("a.jsonl", GOOD.encode("utf-16"), 1, "UTF-16"),
    ("a.jsonl", GOOD.encode("utf-16-le"), 1, "NUL bytes"),
    ("a.jsonl", "", 1, "the file is empty"),
    ("a.jsonl", " \n\n", 1, "the file is empty"),
    ("a.jsonl", ALPACA * 2 + CHATS, 3, "has conversations, the rows before it instruction, output"),
    ("a.jsonl", ALPACA + '{"instruction": "q", "answer": "a"}\n', 2, "has answer, instruction"),
    ("a.jsonl", GOOD + BIG, 2, "longer than 8 MiB"),
    ("a.jsonl", HTML, 1, "HTML"),
    ("a.jsonl", GOOD + '{"text": "a\0b"}\n', 2, "NUL bytes"),
    ("a.jsonl", b"\0" * 4096, 1, "NUL bytes"),
    ("a.jsonl", "[" * 100_000, 1, "not valid JSON"),
    ("a.jsonl", GOOD + '{"text": ' + "9" * 5000 + "}\n", 2, "not valid JSON"),
    ("a.jsonl", gzip.compress(GOOD.encode(), mtime=0), 1, "the file is gzip"),
    ("a.jsonl.gz", GOOD, 1, "gzip"),
    ("a.jsonl.gz", gzip.compress(LINES.encode() * 50, mtime=0)[:-20], None, "cannot be read"),
    ("a.json", json.dumps([{"text": "a"}, {"text": "b"}])[:-9], 2, "not valid JSON"),
    ("a.json", json.dumps([{"text": "a"}])[:-1], 2, "not valid JSON"),
    ("a.json", '[{"text": "a"}, {"text": b}, {"text": "c"}]', 2, "not valid JSON"),
    ("a.json", '[{"text": "a"}, null]', 2, "is null"),
    ("a.json", b'[{"text": "a"}, ' + LATIN + b"]", 2, "not UTF-8"),
    ("a.json", "[]", 1, "the file is empty"),
    ("a.json", f"[{GOOD}, {BIG}]", 2, "longer than"),
    ("a.json", HTML, 1, "HTML"),
    ("a.csv", "text,score\na,1\nb\n", 2, "has 1 fields where the header has 2"),
    ("a.csv", "text,score\na,1\nb,2,3\n", 2, "has 3 fields where the header has 2"),
    ("a.csv", 'text,score\na,1\n"b,2\nc,3\n', 2, "quote"),
    ("a.csv", "text,text\na,1\n", 1, "names a column twice"),
    ("a.csv", "text,score\n", 1, "the file is empty"),
    ("a.csv", "", 1, "the file is empty"),
    ("a.csv", HTML, 1, "HTML"),
    ("a.csv", b"text\na\n" + "caf\u00e9\n".encode("latin-1"), 2, "not UTF-8"),
    ("a.csv", "text\na\n" + "x" * 10_000_000 + "\n", 2, "longer than 8 MiB"),
    ("a.csv", "text,score\na,1\n\0,2\n", 2, "NUL bytes"),
    ("a.parquet", GOOD, 1, "parquet"),
    ("a.parquet", "", 1, "parquet"),
    ("a.parquet", HTML, 1, "parquet"),
    ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", 1, "parquet"),
]


@pytest.mark.parametrize(("name", "content", "row", "words"), MALFORMED)
def test_malformed_files(tmp_path, name, content, row, words):
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        list(read_rows(find_files(str(file))))
    assert len(error.value.problems) == 1
    message = str(error.value)
    assert message.startswith(f"{file}, row {row}: " if row else f"{file}, row ")
    assert words in message
    assert len(message) < 500
    assert "\n" not in message


def test_parquet_cut_off(tmp_path):
    write_parquet(tmp_path / "a.parquet", ROWS)
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[:-6], whole[: len(whole) // 2], whole[:4] + b"\xff" * 60 + whole[64:]):
        write(tmp_path / "a.parquet", content)
        with pytest.raises(UserError, match="row 1: is not readable as parquet"):
            list(read_rows([tmp_path / "a.parquet"]))


def test_parquet_with_a_row_too_long(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": "x" * (MAX_ROW_BYTES + 1)}])
    with pytest.raises(UserError, match="row 2: is longer than 8 MiB"):
        list(read_rows([tmp_path / "a.parquet"]))


def test_schemas_may_not_change_between_files(tmp_path):
    files = [write(tmp_path / "a.jsonl", ALPACA), write(tmp_path / "b.jsonl", CHATS)]
    with pytest.raises(UserError, match=r"b\.jsonl, row 1: has conversations"):
        list(read_rows(files))


def test_memory_does_not_grow_with_the_file(tmp_path):
    row = json.dumps({"text": "x" * 2000})
    write(tmp_path / "a.json", "[" + ",\n".join([row] * 50_000) + "]")  # 100 MB
    code = (
        "import resource, sys; from pathlib import Path; from toolkit.data.sources import read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(1 for _ in read_rows([Path(sys.argv[1])])) == 50_000\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert float(out.stdout) < 40  # MiB


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1}] [{"a": 2}]', "row 2: is not valid JSON: something follows the array"),
        ('[{"a": 1}]' + " " * 2**21 + "x", "something follows the array"),
        ('{"a": 1} x', "row 2: is not valid JSON"),
    ],
)
def test_what_follows_the_rows_of_a_json_file_is_not_lost(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        list(read_rows([write(tmp_path / "a.json", content)]))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_that_names_a_key_twice_is_known_as_such(name: str, tmp_path: Path) -> None:
    rows = '{"prompt": "a", "completion": {"x": 1, "x": 2}}\n{"prompt": "a", "completion": "b"}'
    first, second = read_rows([write(tmp_path / name, rows)])
    assert isinstance(first, Repeated) and not isinstance(second, Repeated)
    assert to_messages(second, "prompt_completion") == to_item(second, "chat", "prompt_completion")
    assert to_item(first, "chat", "prompt_completion") is Reason.REPEATED_KEY


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.ndjson", "rename it to .jsonl"),
        ("a.json.gz", "unpack it"),
        ("a.txt", "A text has no columns"),
    ],
)
def test_a_file_that_is_almost_read_says_what_to_do(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        find_files(str(write(tmp_path / name, LINES)))


@pytest.mark.parametrize("line", [b" " * 1000 + b"\n", b"\n"])
def test_a_gzip_bomb_is_not_read_to_its_end(line: bytes, tmp_path: Path) -> None:
    bomb = write(tmp_path / "a.jsonl.gz", gzip.compress(line * (2**23 // len(line))))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        list(read_rows([bomb]))
