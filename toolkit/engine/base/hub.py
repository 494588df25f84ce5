"""Reaching models and data sets: what is missing, gated or too large is said before anything is downloaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from toolkit.doctor.hub import Repository
from toolkit.doctor.sizes import WEIGHT_FILES, absent_bytes
from toolkit.errors import UserError
from toolkit.hardware import GIB, disk_free_gib
from toolkit.recipe.schema import Recipe

HUB_ERRORS = (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    OSError,
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call their number


def fetching(path: str, kind: str = "model") -> Callable[[], str]:
    """A function that says how much of a repository has reached the cache since now, "" while that is nothing.

    A folder of this machine is not fetched.
    """
    if Path(path).is_dir():
        return str
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type=kind) / "blobs"

    def size() -> float:
        total = 0
        for file in blobs.glob("*"):
            with contextlib.suppress(OSError):  # renamed in this moment
                total += file.stat().st_size
        return total / GIB

    before = size()
    return lambda: f"({fetched:.2f} GiB fetched)" if (fetched := size() - before) >= 0.005 else ""


def check_base(recipe: Recipe, path: str) -> dict[str, Any]:
    """Makes sure that the base model is there and its architecture is the recipe's, before its weights are fetched.

    Returns its config.json.

    Raises UserError: no such model, gated, offline and not cached, no safetensors, a disk without room for it.
    """
    if Path(path).is_dir():
        config_file = Path(path) / "config.json"
        if not config_file.is_file():
            raise UserError(f"{path} has no config.json: it is not a model folder")
        if not any(Path(path).glob("*.safetensors")):
            raise UserError(
                f"{path} has no .safetensors file; other weight formats can run code and are not loaded"
            )
    else:
        try:
            config_file = Path(hf_hub_download(path, "config.json", revision=recipe.model.revision))
        except HUB_ERRORS as error:
            raise UserError(explain(error, "model", path, recipe.model.revision)) from None
        _check_disk(path, recipe.model.revision)
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    config |= config.get("text_config", {})  # of a model that sees too
    refuse_experts(path, config)
    wrong = [
        f"model.architecture.{key}: the recipe says {value}, the config of {recipe.model.path} says {config[key]}"
        for key, value in recipe.model.architecture.model_dump(exclude_none=True).items()
        if key in config and config[key] != value
    ]
    if wrong:
        raise UserError(*wrong)
    return config


def refuse_experts(path: str, config: Mapping[str, Any]) -> None:
    """Raises UserError for a mixture of experts. Its loss in DPO would begin above ln 2 by the loss that balances its
    router (trl/trainer/dpo_trainer.py, aux_loss_enabled), and the plan knows no experts."""
    found = next((number for name in EXPERTS if (number := config.get(name) or 0) > 1), None)
    if found:
        raise UserError(
            f"{path} is a mixture of {found} experts ({config.get('model_type')}): neither the memory plan nor the "
            "proof of DPO's reference holds for one; take a dense model"
        )


def fetch_weights(path: str, revision: str | None) -> Path:
    """The folder of a model's safetensors, configs and card in the local cache, fetched where they are absent.

    Raises UserError: not there, gated, offline and not cached, a disk without room for it.
    """
    _check_disk(path, revision)
    wanted = [f"*{ending}" for ending in WEIGHT_FILES] + ["README.md"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except HUB_ERRORS as error:
        raise UserError(explain(error, "model", path, revision)) from None


def cached_folder(path: str, revision: str | None, kind: str = "model") -> Path:
    """The folder of a model or dataset in the local cache, whatever of it is there; an empty path where nothing is."""
    file = "config.json" if kind == "model" else "README.md"
    try:
        found = try_to_load_from_cache(path, file, revision=revision, repo_type=kind)
    except HFValidationError:  # a path of this machine
        return Path()
    return Path(found).parent if isinstance(found, str) else Path()


def explain(error: BaseException, kind: str, name: str, revision: str | None = None) -> str:
    """One sentence for a failure to reach the Hub: what was asked, why it failed, what fixes it."""
    what = f"{kind} {name}" + (f" at revision {revision}" if revision else "")
    chain = _chain(error)
    if _any(chain, GatedRepoError):
        return (
            f"{what} is gated: accept its licence on its page at huggingface.co, then set HF_TOKEN to a token of "
            "that account (or log in with `hf auth login`)"
        )
    if _any(chain, RevisionNotFoundError):
        return f"{what}: there is no such revision"
    if _any(chain, RepositoryNotFoundError):
        return (
            f"{what} was not found on the Hub: check the spelling; a private one needs HF_TOKEN; "
            "a local path must exist beside the recipe or in the working directory"
        )
    if _any(chain, HFValidationError):
        return f"{what}: no such local path, and it is not a Hub id (owner/name) either"
    if _any(chain, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{what} is not in the local cache and HF_HUB_OFFLINE is set: unset it, or fetch it once while online"
    return (
        f"{what} cannot be reached and is not in the local cache ({type(error).__name__}): check the network; "
        "HF_ENDPOINT names another mirror; a folder on disk works too"
    )


def _check_disk(path: str, revision: str | None) -> None:
    """Raises UserError when the files still to be fetched do not fit on the cache's disk. Silent when offline."""
    try:
        files = HfApi().model_info(path, revision=revision, files_metadata=True).siblings or []
    except HUB_ERRORS:
        return  # offline with a cached config: from_pretrained will say what is missing
    names = [file.rfilename for file in files]
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"model {path} has no .safetensors files; other weight formats can run code, none is loaded"
        )
    absent = absent_bytes(files, Repository("model", path, revision))
    cache = Path(constants.HF_HUB_CACHE)
    free, needed = disk_free_gib(cache), absent / 2**30
    if needed + 1 > free:
        raise UserError(
            f"model {path} needs {needed:.1f} GiB more on disk and {cache} has {free:.1f} GiB free: "
            "free some, or point HF_HOME at a larger volume"
        )


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _any(chain: list[BaseException], kind: Any) -> bool:
    return any(isinstance(error, kind) for error in chain)
