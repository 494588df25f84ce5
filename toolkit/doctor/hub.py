"""The Hub: whether it answers, what of a recipe's model and data is in the cache, which tokens are set.

The cache is looked at in its folders, the network is asked with one HEAD a repository, all at once and within a limit.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from toolkit.doctor.check import Check, judged, ok, warn
from toolkit.hardware import GIB

SECONDS = 2.0  # an answer takes some 0.2 s; a lookup of a name can hang far longer than any socket's limit
Kind = Literal["model", "data set"]
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")


@dataclass(frozen=True)
class Repository:
    """A model or a data set on the Hub, as a recipe names it."""

    kind: Kind
    path: str
    revision: str | None = None

    @property
    def url(self) -> str:
        """Of a small file: whether it can be had says that the repository can."""
        room, file = ("", "config.json") if self.kind == "model" else ("datasets/", "README.md")
        path, revision = quote(self.path), quote(self.revision or "main", safe="")
        return f"{constants.ENDPOINT}/{room}{path}/resolve/{revision}/{file}"


@dataclass(frozen=True)
class Answer:
    """`problem` is None when the repository can be fetched. `seconds` is None when nobody answered."""

    problem: str | None
    seconds: float | None = None


UNREACHABLE = Answer("check the network, or name another mirror with HF_ENDPOINT")


# The network ---------------------------------------------------------------------------------------------------


def ask(urls: Mapping[str, str]) -> dict[str, Answer]:
    """The answer to each of the named addresses, all asked at once; what takes longer than SECONDS gives none."""
    found: dict[str, Answer] = {}
    threads = [
        threading.Thread(target=lambda name=name, url=url: found.update({name: _head(url)}), daemon=True)
        for name, url in urls.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: found.get(name, UNREACHABLE) for name in urls}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect says that the file is there; following it would hand the token to whoever it points at."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _head(url: str) -> Answer:
    token = get_token()
    request = urllib.request.Request(url, method="HEAD")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    started = time.perf_counter()
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS):
            problem = None
    except urllib.error.HTTPError as error:
        problem = _problem(error.code, error.headers.get("X-Error-Code", ""))
    except (OSError, ValueError):
        return UNREACHABLE
    return Answer(problem, time.perf_counter() - started)


def _problem(status: int, code: str) -> str | None:
    """The Hub's own word for what is wrong (huggingface_hub/utils/_http.py); a file that lacks is no matter."""
    if status < 400 or code == "EntryNotFound":
        return None
    if code == "GatedRepo":
        return "it is gated: accept its licence on its page, then set HF_TOKEN to a token of that account"
    if code == "RevisionNotFound":
        return "it has no such revision: see its page for those there are"
    if code == "RepoNotFound" or status in (401, 404):
        return "the Hub does not know it: check the spelling; a private one needs HF_TOKEN"
    return f"the Hub answers with HTTP {status}: try again later"


# The cache -----------------------------------------------------------------------------------------------------


def cached_gib(repository: Repository) -> float | None:
    """GiB of it in the cache, where all that a run needs is there; None where something lacks."""
    return _cached_model(repository) if repository.kind == "model" else _cached_data(repository)


def is_begun(repository: Repository) -> bool:
    """Whether anything of it is in the cache, so that what is asked for may be."""
    file = "config.json" if repository.kind == "model" else "README.md"
    return in_cache(repository, file) is not None or cached_gib(repository) is not None


def in_cache(repository: Repository, file: str) -> str | None:
    """Where a file of it lies; None where it does not."""
    kind = "model" if repository.kind == "model" else "dataset"
    try:
        found = try_to_load_from_cache(repository.path, file, revision=repository.revision, repo_type=kind)
    except HFValidationError:  # a path of this machine that is not there
        return None
    return found if isinstance(found, str) else None


def _cached_model(repository: Repository) -> float | None:
    """Config and weights of a snapshot: one file of safetensors, or all that the index names."""
    config = in_cache(repository, "config.json")
    if config is None:
        return None
    snapshot = Path(config).parent
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        weights = [snapshot / file for file in {*json.loads(index.read_text())["weight_map"].values()}]
    else:
        weights = sorted(snapshot.glob("*.safetensors"))
    if not weights or not all(file.is_file() for file in weights):
        return None
    return _gib(weights)


def _cached_data(repository: Repository) -> float | None:
    """Tables that `datasets` made; it writes the name of a set in lower case with underscores of its own."""
    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    wanted = _letters(repository.path)
    folders = [folder for folder in root.glob("*___*") if _letters(folder.name) == wanted]
    tables = [file for folder in folders for file in folder.rglob("*.arrow")]
    return _gib(tables) if tables else None


def _gib(files: list[Path]) -> float:
    return sum(file.stat().st_size for file in files) / GIB


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# What it means -------------------------------------------------------------------------------------------------


def hub(answer: Answer | None) -> Check:
    """Whether the Hub answers; None: it was not asked."""
    if answer is None:
        return ok("hub", "HF_HUB_OFFLINE is set: not asked, the cache has to do")
    if answer.seconds is None:
        return warn("hub", f"{constants.ENDPOINT} does not answer", "what is in the cache still runs")
    return ok("hub", f"{constants.ENDPOINT} answers in {answer.seconds:.1f} s")


def repository(wanted: Repository, answer: Answer | None) -> Check:
    """Whether a run can have it: from the cache, or else from the Hub; `answer` is None when that was not asked."""
    name = "model" if wanted.kind == "model" else "data"
    what = wanted.path + (f" at {wanted.revision}" if wanted.revision else "")
    gib = cached_gib(wanted)
    if gib is not None:
        return ok(name, f"{what}: in the cache, {gib:.2f} GiB")
    if answer is None:
        problem: str | None = "HF_HUB_OFFLINE is set: unset it, or fetch it once while online"
    else:
        problem = answer.problem
    return judged(name, f"{what}: not in the cache{'' if problem else ', will be fetched'}", problem)


def tokens() -> Check:
    """Which are set, never what they are."""
    found = [name for name in TOKENS if os.environ.get(name)]
    if "HF_TOKEN" not in found and get_token():
        found.append("a login at the Hub")
    return ok("tokens", f"{', '.join(found)} set" if found else f"none of {', '.join(TOKENS)}")
