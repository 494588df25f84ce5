"""The sets of a stage -> one pool of rows in an Arrow file, with the keys and columns that selection asks for.

A row is read once, turned into messages or a pair, written out and let go: however large a set is, only its keys
(16 bytes each) and the columns that a filter or top_k names stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset

from toolkit.data.accounting import Place
from toolkit.data.reasons import REASONS, Reason
from toolkit.data.rows import Item, Labelled, Pair, Question, to_item
from toolkit.data.selection import Condition, Selection, Step, key_of_text, mixed, parse_filter
from toolkit.data.sets import is_local_file, schema_for
from toolkit.data.sources import find_files, read_batches
from toolkit.data.turns import WEIGHTS
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe, Source, StageSection
from toolkit.recipe.stages import RowKind

UNREAD = "columns that are not read"  # the step that names them
MEANINGFUL = ("tools", *WEIGHTS)
SOURCE = 120  # characters of a row's source that are kept
EXCERPT = 600  # characters of a row that could not be read, for the preview
_BATCH = 1000
_SCHEMA = pyarrow.schema(
    [
        ("item", pyarrow.large_string()),
        ("set", pyarrow.int32()),
        ("row", pyarrow.int32()),
        ("source", pyarrow.string()),
    ]
)


@dataclass
class Pool:
    """All rows that were read, by number. `rows` has the columns item (JSON, see `load_item`), set, row and source.

    `source` is what the row's own column of that name says, null where it has none.
    """

    rows: Dataset
    keys: list[bytes]
    prompts: list[bytes]
    sets: list[str]


def read_sets(
    recipe: Recipe,
    section: StageSection,
    kind: RowKind,
    sources: tuple[Source, ...],
    folder: Path,
    at_most: int | None = None,
) -> tuple[Pool, Selection]:
    """All sets in one pool, and the rows of it that each set's own filter, top_k, rows and weight leave, mixed.

    Stops reading a set once nothing more of it can be used, and in any case with `at_most` rows.
    Raises UserError for a set that cannot be reached, read or understood.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = section.max_rows if len(sources) == 1 and sources is section.datasets else None
    reads = []
    for which, source in enumerate(sources):
        limit = None if source.top_k else min(filter(None, (source.rows, wanted)), default=None)
        reading = _Reading(recipe, section, kind, source, which)
        reading.read(folder / f"{which}.arrow", limit, at_most)
        reads.append((reading, reading.selected()))
    starts = [sum(len(reading.keys) for reading, _ in reads[:which]) for which in range(len(reads))]
    weights = [source.weight for source in sources if source.weight is not None]
    order = mixed([len(selected.rows) for _, selected in reads], weights or None)
    steps = [
        Step(f"read {reading.source.path}", len(reading.keys), len(reading.keys)) for reading, _ in reads
    ]
    steps += [
        Step(f"{UNREAD} of {reading.source.path}: {', '.join(reading.unread)}", *[len(reading.keys)] * 2)
        for reading, _ in reads
        if reading.unread
    ]
    steps += [
        Step(f"{reading.source.path}: {step.what}" if len(reads) > 1 else step.what, *step[1:])
        for reading, selected in reads
        for step in selected.steps
    ]
    if weights:
        steps.append(Step("mix by weight", sum(len(selected.rows) for _, selected in reads), len(order)))
    pool = Pool(
        datasets.concatenate_datasets([Dataset.from_file(str(reading.file)) for reading, _ in reads]),
        [key for reading, _ in reads for key in reading.keys],
        [key for reading, _ in reads for key in reading.prompts],
        [source.path for source in sources],
    )
    return pool, Selection(
        tuple(starts[which] + reads[which][1].rows[row] for which, row in order), tuple(steps)
    )


def places_of(sets: list[str], which: list[int], rows: list[int]) -> list[Place]:
    """Where rows stand: their numbers, each with its set's path where there are several."""
    return list(rows) if len(sets) == 1 else [(sets[i], row) for i, row in zip(which, rows, strict=True)]


def load_item(text: str) -> Item:
    """The inverse of what `read_sets` writes."""
    value: Any = json.loads(text)
    if isinstance(value, dict):
        return REASONS[value["reason"]]
    if not (value and isinstance(value[0], list)):
        messages: Item = value
        return messages
    if isinstance(value[-1], bool):
        return Labelled(*value)
    return Question(*value) if len(value) == len(Question._fields) else Pair(*value)


def excerpt(text: str) -> str:
    """The beginning of the row behind an item that is a reason."""
    return str(json.loads(text)["row"])


@dataclass
class _Reading:
    """One set on its way from its rows to a file."""

    recipe: Recipe
    section: StageSection
    kind: RowKind
    source: Source
    which: int
    schema: str | None = None
    unread: list[str] = field(default_factory=list)
    file: Path = Path()
    keys: list[bytes] = field(default_factory=list)
    prompts: list[bytes] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def read(self, file: Path, limit: int | None, at_most: int | None) -> None:
        """Writes the set to `file`: all of it, `at_most` so many rows, or until `limit` of them are of use."""
        self.file = file
        conditions = parse_filter(self.source.filter) if self.source.filter else []
        top = [self.source.top_k.column] if self.source.top_k else []
        self.columns = {column: [] for column in [*(condition.column for condition in conditions), *top]}
        is_partial = limit is not None or at_most is not None
        usable: set[Any] = set()  # rows that pass the filter; of those that are alike one
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, _SCHEMA) as writer:
            rows = _ArrowRows(writer, self.which)
            for row in rows_of(self.recipe, self.source, is_partial):
                item = self._item(row)
                text = _dump(item, row)
                self._remember(item, text, row)
                rows.add(text, row)
                if limit and _meets(row, conditions):
                    usable.add(self.keys[-1] if self.section.deduplicate else len(self.keys))
                if len(self.keys) == at_most or (limit and len(usable) >= limit):
                    break
            rows.flush()

    def _item(self, row: dict[str, Any]) -> Item:
        """What a row means. The first one decides the schema, where the recipe names none."""
        if self.schema is None:
            self.schema = schema_for(self.source, self.kind, row)
            self.unread = [column for column in MEANINGFUL if row.get(column) is not None]
        return to_item(row, self.kind, self.schema, self.section.system_turn)

    def selected(self) -> Selection:
        """What the source's own steps leave, in file order."""
        source, selection = self.source, Selection.of(len(self.keys))
        if source.filter:
            selection = selection.where(source.filter, self.columns)
        if source.top_k:
            selection = selection.top(source.top_k.rows, source.top_k.column, self.columns)
        if self.section.deduplicate:
            selection = selection.distinct(self.keys)
        return selection.first(source.rows) if source.rows else selection

    def _remember(self, item: Item, text: str, row: dict[str, Any]) -> None:
        """Its keys: what makes a row a duplicate, and a prompt the same. A row without turns is like no other."""
        if isinstance(item, Reason):
            key = prompt = key_of_text(f"set {self.which} row {len(self.keys)}")
        else:
            turns = item if isinstance(item, list) else item.prompt
            asked = next(turn["content"] for turn in turns if turn["role"] == "user")
            key, prompt = key_of_text(text), key_of_text(json.dumps(asked.strip()))
        self.keys.append(key)
        self.prompts.append(prompt)
        for column, values in self.columns.items():
            if column not in row:
                raise UserError(
                    f"{self.source.path}: filter or top_k names the column {column!r}; "
                    f"its columns: {', '.join(row)}"
                )
            values.append(row[column])


class _ArrowRows:
    """Rows of a set on their way to a file, a batch at a time, numbered from 1."""

    def __init__(self, writer: Any, which: int):
        self._writer, self._which, self._num_written = writer, which, 0
        self._texts: list[str] = []
        self._origins: list[str | None] = []

    def add(self, text: str, row: dict[str, Any]) -> None:
        self._texts.append(text)
        self._origins.append(_origin(row.get("source")))
        if len(self._texts) == _BATCH:
            self.flush()

    def flush(self) -> None:
        """Writes what waits for its batch to be full."""
        count = len(self._texts)
        numbers = range(self._num_written + 1, self._num_written + count + 1)
        columns = (self._texts, [self._which] * count, numbers, self._origins)
        arrays = [pyarrow.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
        self._writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
        self._num_written += count
        self._texts, self._origins = [], []


def _dump(item: Item, row: dict[str, Any]) -> str:
    if isinstance(item, Reason):
        excerpt = json.dumps(row, ensure_ascii=False, default=str)[:EXCERPT]
        return json.dumps({"reason": item.value, "row": excerpt})
    return json.dumps(item)


def _origin(source: Any) -> str | None:
    if not (isinstance(source, str) and source.strip()):
        return None
    return source[:SOURCE].encode("utf-8", "replace").decode()  # half a character is none for Arrow


def _meets(row: dict[str, Any], conditions: list[Condition]) -> bool:
    try:
        return all(condition.holds(row[condition.column]) for condition in conditions)
    except TypeError:
        return False  # selection.where names the row


# Where rows come from ------------------------------------------------------------------------------------------


def rows_of(recipe: Recipe, source: Source, is_partial: bool) -> Iterator[dict[str, Any]]:
    """Rows of a set: local files, a folder, or the Hub (streamed when only a part of it is wanted)."""
    path = recipe.locate(source.path)
    if is_local_file(recipe, source):
        for batch in read_batches(find_files(path)):
            yield from batch
        return
    is_saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        for batch in (_saved(path, source) if is_saved else _loaded(path, source, is_partial)).iter(_BATCH):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            raise UserError(explain(error, "data set", path, source.revision)) from None
        raise UserError(f"data set {path} cannot be read: {_first_line(error)}") from None
    except HUB_ERRORS as error:
        raise UserError(explain(error, "data set", path, source.revision)) from None


def _saved(path: str, source: Source) -> Dataset:
    saved = datasets.load_from_disk(path)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if source.split not in saved:
        raise UserError(f"data set {path} has no split {source.split!r}; it has: {', '.join(saved)}")
    return saved[source.split]


def _loaded(path: str, source: Source, is_partial: bool) -> Any:
    return datasets.load_dataset(
        path,
        source.name,
        data_dir=source.data_dir,
        split=source.split,
        revision=source.revision,
        streaming=is_partial,
    )


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
