"""Prepared rows on disk: an entry is found again by everything that decides its rows, and complete or not there.

Entries lie in ~/.cache/finetune-toolkit/data (or under XDG_CACHE_HOME) and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from toolkit.data.masking import Masking
from toolkit.data.sets import is_local_file
from toolkit.data.sources import find_files
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.errors import UserError
from toolkit.files import digest
from toolkit.recipe.schema import Recipe, Source, StageSection
from toolkit.recipe.stages import RowKind
from toolkit.run import caches

CODE = (
    "data/accounting data/json_stream data/masking data/reasons data/rows data/schemas data/selection data/sets "
    "data/sources data/template data/turns engine/data/preparation engine/data/cache engine/data/reading"
)
LIBRARIES = ("tokenizers", "jinja2", "datasets")
INDEX = "entry.json"
ATTEMPTS = 5  # to put an entry in place of a damaged one, while others do the same
_CHUNK = 2**20

# Else what a library makes of rows (add_column, map) is kept in their entry, outside its index, and used again.
datasets.disable_caching()

_TOOLKIT = Path(__file__).resolve().parents[2]


def key_of_rows(recipe: Recipe, section: StageSection, kind: RowKind, masking: Masking) -> str:
    """Names what decides the rows: sets and their content, recipe fields, tokenizer, template, code."""
    tokenizer = json.loads(masking.tokenizer.to_str())
    facts = {
        "kind": kind,
        "fields": recipe.row_values(section),
        "rows": [_content(recipe, source) for source in (*section.datasets, *section.eval_datasets)],
        # what masking sets aside does not count: transformers leaves truncation and padding as last used
        "tokenizer": {
            part: tokenizer[part] for part in tokenizer.keys() - {"truncation", "padding", "post_processor"}
        },
        "template": [masking.template.source, masking.template.bos_token, masking.template.eos_token],
        "end_of_turn": masking.end_of_turn,
        "code": [digest(_TOOLKIT / f"{module}.py") for module in CODE.split()],
        "libraries": {library: version(library) for library in LIBRARIES},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A complete one: its Arrow files, by path in `folder`, and what was recorded of them."""

    folder: Path
    files: list[str]
    facts: dict[str, Any]

    def rows(self, side: str) -> datasets.Dataset | None:
        """The rows of a side, memory-mapped, from the files that the index names alone; None when there are none."""
        files = sorted(file for file in self.files if Path(file).parent.name == side)
        parts = [datasets.Dataset.from_file(str(self.folder / file)) for file in files]
        return datasets.concatenate_datasets(parts) if parts else None


def load(key: str) -> Entry | None:
    """The entry of that name; None where there is none or it is damaged."""
    folder = _folder() / key
    with contextlib.suppress(OSError):
        os.utime(folder)  # when it was last used
    try:
        index = json.loads((folder / INDEX).read_text())
        found = Entry(folder, list(index["files"]), index["facts"])
        is_complete = index["facts_crc"] == _crc_of(index["facts"]) and all(
            _crc(folder / file) == crc for file, crc in index["files"].items()
        )
        return found if is_complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def make(key: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """An entry from what `build` writes into an empty folder and returns; appears under its name at once or never.

    Where another process made the same one meanwhile, that one stays and is taken. Raises UserError where the cache
    cannot be written, and what `build` raises.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        temporary = Path(tempfile.mkdtemp(prefix=caches.MAKING, dir=_folder()))
    except OSError as error:
        raise _not_written(error) from None
    try:
        facts = build(temporary)
        files = {str(file.relative_to(temporary)): _crc(file) for file in sorted(temporary.rglob("*.arrow"))}
        index = {"facts": facts, "facts_crc": _crc_of(facts), "files": files}
        (temporary / INDEX).write_text(json.dumps(index))
        return _settled(temporary, key)
    except OSError as error:
        raise _not_written(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settled(made: Path, key: str) -> Entry:
    """The entry once it bears its name. A complete one is never replaced: another process may be reading it."""
    for _ in range(ATTEMPTS):
        try:
            made.rename(_folder() / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if entry := load(key):
            return entry
        aside = Path(tempfile.mkdtemp(prefix=caches.MAKING, dir=_folder()))
        with contextlib.suppress(FileNotFoundError):  # another process took the damaged one away first
            (_folder() / key).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise UserError(
        f"the prepared rows in {_folder() / key} are damaged as soon as they are written: check the disk, or point "
        "XDG_CACHE_HOME at another one"
    )


class Unchanged:
    """Local files of a section's sets, to be asked whether they are still what they were: a row that is read after its
    file was hashed belongs to that hash only then."""

    def __init__(self, recipe: Recipe, section: StageSection):
        self._sources = [(recipe, source) for source in (*section.datasets, *section.eval_datasets)]
        self._before = self._stamps()

    def check(self) -> None:
        """Raises UserError naming the files that were written, made or taken away since."""
        now = self._stamps()
        changed = [str(file) for file in {**self._before, **now} if self._before.get(file) != now.get(file)]
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed while it was read, and nothing of it is kept: run the same command "
                "again once nobody writes there"
            )

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        """Any write changes the time of change, which nobody can set back."""
        files = [file for recipe, source in self._sources for file in _local_files(recipe, source) or ()]
        stats = ((file, file.stat()) for file in files)
        return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats}


def _local_files(recipe: Recipe, source: Source) -> list[Path] | None:
    """All files of a set on this machine; None for one on the Hub."""
    path = recipe.locate(source.path)
    if is_local_file(recipe, source) or Path(path).is_dir():
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else find_files(path)
        return [file for file in files if file.is_file()]
    return None


def _content(recipe: Recipe, source: Source) -> Any:
    """What stands for the rows of a set: the bytes of local files, the commit of a set on the Hub."""
    files = _local_files(recipe, source)
    if files is not None:
        return [[file.name, digest(file)] for file in files]
    path = recipe.locate(source.path)
    try:
        builder = datasets.load_dataset_builder(
            path, source.name, data_dir=source.data_dir, revision=source.revision
        )
    except (datasets.exceptions.DatasetNotFoundError, *HUB_ERRORS) as error:
        raise UserError(explain(error, "data set", path, source.revision)) from None
    except ValueError as error:
        raise UserError(f"data set {path} cannot be read: {' '.join(str(error).split())[:400]}") from None
    return builder.hash


def _folder() -> Path:
    return caches.prepared_rows()


def _sweep() -> None:
    """Removes what killed runs left."""
    for leftover in _folder().glob(f"{caches.MAKING}*"):
        if time.time() - leftover.stat().st_mtime > caches.ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc_of(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts).encode())


def _not_written(error: OSError) -> UserError:
    return UserError(
        f"the prepared rows cannot be written to {_folder()}: {error.strerror or error}; "
        "point XDG_CACHE_HOME at a volume with room"
    )
