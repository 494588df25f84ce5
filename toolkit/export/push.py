"""Uploads a checked export to the Hub: private unless said otherwise, retried, and taken up where it stopped.

The token comes from the environment (HF_TOKEN) or from `hf auth login`, and huggingface_hub alone reads it: it is never
an option, never printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.errors import UserError
from toolkit.export.artefact import Wanted, files, read_mark
from toolkit.redaction import BLANK, SHAPES, blanked, redacted
from toolkit.run.sealing import MARK, damage

CARD = "README.md"
SAID = (".md", ".json", ".jinja", "")  # suffixes of texts; a Modelfile has none
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 2.0  # doubled each time: half a minute in all
TRANSIENT = {408, 429, 500, 502, 503, 504}


def push(
    wanted: Wanted,
    repository: str,
    public: bool,
    dry_run: bool,
    console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Uploads the export, or with `dry_run` lists what would be uploaded.

    A file that the repository already holds is not sent again, so a stopped upload goes on by the same command. Raises
    UserError: no checked export there, one that was changed since, no or a wrong token, no right to write there, a Hub
    that does not answer.
    """
    mark = read_mark(wanted.folder)
    if mark is None or not mark.verified:
        raise UserError(f"{wanted.folder} is no checked export: only what passed its check is uploaded")
    if problem := damage(wanted.folder, MARK):
        raise UserError(
            f"{wanted.folder} is not as it was checked: {problem}; make the export again, and edit its card on the Hub"
        )
    found = files(wanted.folder, mark)
    if secret := [name for name in found if _holds_secret(wanted.folder / name)]:
        raise UserError(
            f"{', '.join(secret)} in {wanted.folder} hold what looks like a token, a key or a password, or what was "
            "blanked as one: take it out of the recipe (description, prompts, paths) and export again"
        )
    seen = "public" if public else "private"
    table = Table(box=None, padding=(0, 2))
    table.add_column(escape(f"to {repository} ({seen})"))
    table.add_column("MiB", justify="right")
    for name, size in found.items():
        table.add_row(escape(name), f"{size / 2**20:,.2f}")
    table.add_row("[bold]in all[/]", f"[bold]{sum(found.values()) / 2**20:,.2f}[/]")
    console.print(table)
    if dry_run:
        console.print("dry run: nothing was uploaded")
        return
    url = _upload(wanted, repository, public, list(found), console, sleep)
    console.print(f"[bold green]uploaded[/]: {escape(url)}")


def _holds_secret(file: Path) -> bool:
    """Whether the card has what is blanked elsewhere, or a file for programs a token. Vocabularies are not read."""
    if file.suffix not in SAID or file.name in ("tokenizer.json", "vocab.json"):
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return bool(SHAPES.search(text)) or (file.name == CARD and (BLANK in text or blanked(text) != text))


def _upload(
    wanted: Wanted,
    repository: str,
    public: bool,
    names: list[str],
    console: Console,
    sleep: Callable[[float], None],
) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    if get_token() is None:
        raise UserError(
            "no Hub token: set HF_TOKEN, or log in with `hf auth login`; it needs the right to write "
            "(huggingface.co/settings/tokens)"
        )
    api = HfApi()
    message = f"{wanted.recipe.name}, {wanted.name}: {wanted.format}" + (
        f" {wanted.quant}" if wanted.quant else ""
    )
    for attempt in range(1, ATTEMPTS + 1):
        try:
            url = api.create_repo(repository, private=not public, exist_ok=True)
            if not public and not api.repo_info(repository).private:
                raise UserError(
                    f"{repository} is there already and is public, and the upload is to be private: make it private on "
                    "the Hub, name another repository, or add --public"
                )
            api.upload_folder(
                repo_id=repository, folder_path=wanted.folder, allow_patterns=names, commit_message=message
            )
            return str(url)
        except UserError:
            raise
        except Exception as error:
            status = _status(error)
            if not _is_transient(error, status):
                raise UserError(_explain(error, status, repository)) from None
            if attempt == ATTEMPTS:
                raise UserError(
                    f"the Hub did not take {repository} in {ATTEMPTS} attempts ({_words(error)}): run "
                    "the same command again later; what is there already is not sent again"
                ) from None
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)
            console.print(
                f"[yellow]the Hub answered {status or type(error).__name__}; again in {pause:g} s[/]"
            )
            sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException, status: int | None) -> bool:
    import httpx

    return status in TRANSIENT or (
        status is None and isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))
    )


def _explain(error: BaseException, status: int | None, repository: str) -> str:
    if status == 401:
        return (
            "the Hub does not know this token (401): set HF_TOKEN to a valid one, or log in again with "
            "`hf auth login`"
        )
    if status in (403, 404):
        return (
            f"this token may not write to {repository} ({status}): take a repository of your own, and a token "
            "with the right to write"
        )
    return f"the Hub refused {repository}: {_words(error)}"


def _words(error: BaseException) -> str:
    """The first line of an error, without secrets."""
    return (redacted(str(error)).strip().splitlines() or [type(error).__name__])[0]
