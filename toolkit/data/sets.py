"""The sets of a recipe before anything heavy is loaded: which are local files, and what is plainly wrong with them."""

import itertools
import os
from dataclasses import dataclass

from toolkit.data.rows import recognise, to_item
from toolkit.data.selection import parse_filter
from toolkit.data.sources import check_folder, find_files, is_readable, read_rows
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe, Source, StageSection
from toolkit.recipe.stages import RowKind

LOOKED_AT = 50_000  # rows of a set, about a second: a larger set is read to its end when it is prepared


def is_local_file(recipe: Recipe, source: Source) -> bool:
    """Whether the set is files that `sources` reads itself; else it is a folder, or an id of the Hub."""
    path = recipe.locate(source.path)
    return not os.path.isdir(path) and (
        path != source.path or is_readable(path) or path.startswith(("/", "./", "../"))
    )


@dataclass(frozen=True)
class Looked:
    """`num_rows` is how many rows of training there are at most, None where that is not known."""

    problems: list[str]
    num_rows: int | None


def look_at(recipe: Recipe, section: StageSection, kind: RowKind) -> Looked:
    """One problem for each local set of a stage that cannot be read or understood, found within seconds."""
    found: list[str] = []
    counts: list[int | None] = []
    for source in (*section.datasets, *section.eval_datasets):
        count = None
        try:
            parse_filter(source.filter or "x == 0")
            if is_local_file(recipe, source):
                count = _look_at(recipe, kind, source)
            elif os.path.isdir(path := recipe.locate(source.path)):
                check_folder(path)
        except UserError as error:
            found += error.problems
        counts.append(count)
    known = [count for count in counts[: len(section.datasets)] if count is not None]
    most = sum(known) if len(known) == len(section.datasets) else None
    limits = [limit for limit in (most, section.max_rows) if limit is not None]
    return Looked(found, min(limits, default=None))


def problems(recipe: Recipe, section: StageSection, kind: RowKind) -> list[str]:
    return look_at(recipe, section, kind).problems


def schema_for(source: Source, kind: RowKind, row: dict[str, object]) -> str:
    """The schema that the source names, or the one that its first row fits. Raises UserError, naming the set."""
    if source.rows_schema:
        return source.rows_schema
    try:
        return recognise(row, kind, row)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def _look_at(recipe: Recipe, kind: RowKind, source: Source) -> int | None:
    """How many rows it has, None for more than were looked at."""
    files = find_files(recipe.locate(source.path), recipe.looked_in(source.path))
    rows = itertools.islice(read_rows(files), LOOKED_AT)
    first = next(rows)  # an empty file has raised
    count = 1 + sum(1 for _ in rows)
    to_item(first, kind, schema_for(source, kind, first))
    return count if count < LOOKED_AT else None
