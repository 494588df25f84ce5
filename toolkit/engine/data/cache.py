"""Prepared rows on disk: an entry is found again by everything that decides its rows, and complete or not there.

Entries lie in ~/.cache/finetune-toolkit/data (or under XDG_CACHE_HOME) and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from toolkit import env
from toolkit.data.masking import Masking
from toolkit.data.sets import is_local_file
from toolkit.data.sources import find_files
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.errors import UserError
from toolkit.files import digest
from toolkit.recipe.schema import Recipe, Source, StageSection
from toolkit.recipe.stages import RowKind
from toolkit.run import sealing

CODE = (
    "data/accounting data/json_stream data/masking data/reasons data/rows data/schemas data/selection data/sets "
    "data/sources data/template data/turns engine/data/preparation engine/data/cache engine/data/reading"
)
LIBRARIES = ("tokenizers", "jinja2", "datasets")
INDEX = "entry.json"
ABANDONED_SECONDS = 24 * 3600
_CHUNK = 2**20

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


def load(key: str) -> tuple[Path, dict[str, Any]] | None:
    """(folder, what was recorded) of a complete entry; None where there is none or it is damaged."""
    folder = _folder() / key
    try:
        index = json.loads((folder / INDEX).read_text())
        whole = all(_crc(folder / file) == crc for file, crc in index["files"].items())
        return (folder, index["facts"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def make(key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """An entry from what `build` writes into an empty folder and returns; appears under its name at once or never.

    Raises UserError where the cache cannot be written, and what `build` raises.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=_folder()))
    except OSError as error:
        raise _not_written(error) from None
    try:
        facts = build(temporary)
        files = {str(file.relative_to(temporary)): _crc(file) for file in sorted(temporary.rglob("*.arrow"))}
        (temporary / INDEX).write_text(json.dumps({"facts": facts, "files": files}))
        target = _folder() / key
        sealing.put_in_place(temporary, target)  # of one that another process made meanwhile ours is as good
    except OSError as error:
        raise _not_written(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target, facts


def _content(recipe: Recipe, source: Source) -> Any:
    """What stands for the rows of a set: the bytes of local files, the commit of a set on the Hub."""
    path = recipe.locate(source.path)
    if is_local_file(recipe, source) or Path(path).is_dir():
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else find_files(path)
        return [[file.name, digest(file)] for file in files if file.is_file()]
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
    return env.cache_folder() / "data"


def _sweep() -> None:
    """Removes what killed runs left."""
    for leftover in _folder().glob(".making-*"):
        if time.time() - leftover.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _not_written(error: OSError) -> UserError:
    return UserError(
        f"the prepared rows cannot be written to {_folder()}: {error.strerror or error}; "
        "point XDG_CACHE_HOME at a volume with room"
    )
