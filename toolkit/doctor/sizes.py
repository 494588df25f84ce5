"""What a recipe still takes from the Hub: each part with its bytes and licence, before any of it is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from toolkit.data import sets
from toolkit.doctor import hub
from toolkit.doctor.hub import Repository
from toolkit.errors import UserError
from toolkit.hardware import GIB, disk_free_gib
from toolkit.recipe.schema import Recipe, Source

WEIGHT_FILES = (".safetensors", ".json", ".model", ".jinja")
SPARE_GIB = 1.0
TABLES = 2  # a set is kept as it was fetched, and as the tables that are made of it


@dataclass(frozen=True)
class Part:
    """One repository. `source` says of a data set which part of it; `needed_gib` is what the disk will take up."""

    repository: Repository
    source: Source | None
    needed_gib: float
    licence: str | None

    def told(self) -> str:
        licence = f"; licence {self.licence}" if self.licence else ""
        there = f"{self.needed_gib:.2f} GiB to fetch" if self.needed_gib else "in the cache"
        return f"{self.repository.kind} {self.repository.path}: {there}{licence}"


def parts(recipe: Recipe, with_base: bool) -> list[Part]:
    """Everything that is not a file of this machine, the 16-bit base where it is asked for.

    Raises UserError with all that stands in the way: offline, no such repository, gated, a disk without room.
    """
    wanted = list(_wanted(recipe, with_base))
    if wanted and constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and fetching takes a network: unset it for this command")
    answers = hub.ask({one.url: one.url for one, _ in wanted})
    problems = [
        f"{one.kind} {one.path}: {problem}" for one, _ in wanted if (problem := answers[one.url].problem)
    ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    found = [_part(one, source) for one, source in wanted]
    needed, cache = sum(part.needed_gib for part in found), Path(constants.HF_HUB_CACHE)
    if needed and needed + SPARE_GIB > (free := disk_free_gib(cache)):
        raise UserError(
            f"{needed:.1f} GiB are to be fetched and {cache} has {free:.1f} GiB free: free some, or point HF_HOME at "
            "a larger volume"
        )
    return found


def absent_bytes(files: Iterable[Any], repository: Repository) -> int:
    """Of a model's files those that a run loads, and that are not in the cache."""
    return sum(
        file.size or 0
        for file in files
        if file.rfilename.endswith(WEIGHT_FILES) and hub.in_cache(repository, file.rfilename) is None
    )


def _wanted(recipe: Recipe, with_base: bool) -> Iterator[tuple[Repository, Source | None]]:
    models = [(recipe.model.path, recipe.model.revision)]
    if with_base and recipe.model.base_16bit:
        models.append((recipe.model.base_16bit, None))
    for path, revision in models:
        if not Path(recipe.locate(path)).exists():
            yield Repository("model", path, revision), None
    sections = [recipe.section(stage.name) for stage in recipe.stages()]
    sources = [source for section in sections for source in (*section.datasets, *section.eval_datasets)]
    seen = set()
    for source in sources:
        part = (source.path, source.name, source.data_dir, source.split, source.revision)
        if not (
            part in seen or sets.is_local_file(recipe, source) or Path(recipe.locate(source.path)).exists()
        ):
            yield Repository("data set", source.path, source.revision), source
        seen.add(part)


def _part(repository: Repository, source: Source | None) -> Part:
    api = HfApi(endpoint=constants.ENDPOINT)
    ask: Any = api.model_info if source is None else api.dataset_info
    try:
        info = ask(repository.path, revision=repository.revision, files_metadata=True)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{repository.kind} {repository.path}: its files cannot be listed ({error})"
        ) from None
    files = info.siblings or []
    if source is None:
        needed = absent_bytes(files, repository)
    elif hub.cached_gib(repository) is not None:
        needed = 0
    else:
        folder = f"{source.data_dir.rstrip('/')}/" if source.data_dir else ""
        needed = TABLES * sum(file.size or 0 for file in files if file.rfilename.startswith(folder))
    licence = getattr(info.card_data, "license_name", None) or getattr(info.card_data, "license", None)
    return Part(repository, source, needed / GIB, licence if isinstance(licence, str) else None)
