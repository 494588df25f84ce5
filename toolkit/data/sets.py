"""The sets of a recipe before anything heavy is loaded: which are local files, and what is plainly wrong with them."""

import itertools
import os

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


def problems(recipe: Recipe, section: StageSection, kind: RowKind) -> list[str]:
    """One message for each local set of a stage that cannot be read or understood, found within seconds."""
    found: list[str] = []
    for source in (*section.datasets, *section.eval_datasets):
        try:
            parse_filter(source.filter or "x == 0")
            if is_local_file(recipe, source):
                _look_at(recipe, kind, source)
            elif os.path.isdir(path := recipe.locate(source.path)):
                check_folder(path)
        except UserError as error:
            found += error.problems
    return found


def schema_for(source: Source, kind: RowKind, row: dict[str, object]) -> str:
    """The schema that the source names, or the one that its first row fits. Raises UserError, naming the set."""
    if source.rows_schema:
        return source.rows_schema
    try:
        return recognise(row, kind, row)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def _look_at(recipe: Recipe, kind: RowKind, source: Source) -> None:
    rows = itertools.islice(read_rows(find_files(recipe.locate(source.path))), LOOKED_AT)
    first = next(rows)  # an empty file has raised
    for _ in rows:
        pass
    to_item(first, kind, schema_for(source, kind, first))
