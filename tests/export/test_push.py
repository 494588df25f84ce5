"""Uploads, against a local stand-in of the Hub: private, retried, never twice, and silent about the token."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from rich.console import Console

from toolkit.errors import UserError
from toolkit.export.artefact import Wanted
from toolkit.export.push import push
from toolkit.files import write_json
from toolkit.recipe.load import load
from toolkit.records.marks import ExportMark
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK, seal

TOKEN = "hf_" + "x" * 34
WEIGHTS = b"weights" * 1000


class Hub(ThreadingHTTPServer):
    """What the Hub answers to an upload, as far as huggingface_hub asks; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, bool] = {}  # name -> private
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.files: dict[str, str] = {}  # path -> text, or the SHA-256 of a large one
        self.failing: list[tuple[str, int]] = []  # (part of a path, status): once each
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid username or password."}, 401)
        self._send({"id": f"me/{name}", "private": self.server.repositories[name]})

    def _answer(self, verb: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.seen.append(f"{verb} {self.path}")
        for failure in hub.failing:
            if failure[0] in self.path:
                hub.failing.remove(failure)
                return self._send({"error": "not now"}, failure[1])
        if verb == "PUT":
            hub.large[hashlib.sha256(body).hexdigest()] = body
            return self._send({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.repositories.setdefault(
                asked["name"], asked.get("private") or asked.get("visibility") == "private"
            )
            return self._send({"url": f"{hub.url}/me/{asked['name']}"})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send({"files": modes})
        if self.path.endswith("/objects/batch"):
            objects = [
                one
                | (
                    {}
                    if one["oid"] in hub.large
                    else {"actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}}
                )
                for one in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"]).decode()
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = value["oid"]
            return self._send({"commitOid": "c" * 40, "commitUrl": f"{hub.url}/me/x/commit/{'c' * 40}"})
        return self._send({})  # the model card's validation

    def _send(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Wanted:
    folder = tmp_path / "dpo-adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("---\nbase_model: a/b\n---\n# card\n")
    (folder / "parity.json").write_text("{}")
    seal(folder, MARK, replace(ExportMark.unknown(), format="adapter", verified=True))
    return Wanted(load("tiny"), RunDir(tmp_path, "tiny", "dpo"), "adapter", None, folder, True, None)


def upload(export: Wanted, public: bool = False, dry_run: bool = False) -> str:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    try:
        push(export, "me/tiny-dpo", public, dry_run, console, sleep=lambda seconds: None)
    except UserError as error:
        return console.export_text() + "\n".join(error.problems)
    return console.export_text()


def test_an_export_is_uploaded_whole_and_private(hub: Hub, export: Wanted) -> None:
    said = upload(export)
    assert hub.repositories == {"tiny-dpo": True}
    assert hub.files.keys() == {"README.md", "adapter_model.safetensors", "parity.json"}
    assert hub.large[hub.files["adapter_model.safetensors"]] == WEIGHTS
    assert "uploaded" in said and "private" in said and TOKEN not in said


def test_only_public_makes_it_public(hub: Hub, export: Wanted) -> None:
    upload(export, public=True)
    assert hub.repositories == {"tiny-dpo": False}


@pytest.mark.parametrize(
    "place", ["/api/repos/create", "/preupload/", "/objects/batch", "/store/", "/commit/"]
)
def test_one_failing_request_is_tried_again(hub: Hub, export: Wanted, place: str) -> None:
    hub.failing = [(place, 503)]
    assert "uploaded" in upload(export)
    assert hub.large[hub.files["adapter_model.safetensors"]] == WEIGHTS


def test_what_is_there_already_is_not_sent_again(hub: Hub, export: Wanted) -> None:
    upload(export)
    upload(export)
    assert sum(request.startswith("PUT") for request in hub.seen) == 1


def test_a_hub_that_stays_away_is_given_up_with_words(hub: Hub, export: Wanted) -> None:
    hub.failing = [("/api/repos/create", 500)] * 100
    assert "run the same command again later" in upload(export)


def test_a_wrong_token_and_none_are_said_and_never_shown(
    hub: Hub, export: Wanted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "y" * 34)
    said = upload(export)
    assert "does not know this token (401)" in said
    assert wrong not in said + "".join(capfd.readouterr()) and not hub.files
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "set HF_TOKEN" in upload(export)


def test_a_dry_run_lists_and_sends_nothing(hub: Hub, export: Wanted) -> None:
    said = upload(export, dry_run=True)
    assert all(name in said for name in ("me/tiny-dpo", "adapter_model.safetensors", "nothing was uploaded"))
    assert MARK not in said and not hub.seen


@pytest.mark.parametrize("mark", [{"format": "adapter", "verified": False}, None])
def test_only_a_checked_export_is_uploaded(hub: Hub, export: Wanted, mark: dict[str, Any] | None) -> None:
    if mark:
        write_json(export.folder / MARK, mark)
    else:
        (export.folder / MARK).unlink()
    assert "no checked export" in upload(export) and not hub.seen


def test_nothing_private_goes_to_a_repository_that_is_public_already(hub: Hub, export: Wanted) -> None:
    hub.repositories["tiny-dpo"] = False
    assert "is there already and is public" in upload(export)
    assert not hub.files and not hub.large
    assert "uploaded" in upload(export, public=True)


@pytest.mark.parametrize("secret", [TOKEN, "***", "hunter2hunter2", "https://me:pass@word/x@example.org"])
def test_a_card_with_a_secret_is_not_uploaded(
    secret: str, hub: Hub, export: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("my_password", "hunter2hunter2")
    (export.folder / "README.md").write_text(f"# card\n{secret}\n")
    mark = ExportMark.load(export.folder / MARK)
    (export.folder / MARK).unlink()
    seal(export.folder, MARK, mark)  # type: ignore[arg-type]
    assert "README.md in" in (said := upload(export)) and "take it out of the recipe" in said
    assert not hub.seen


def test_a_link_in_an_export_is_not_followed(hub: Hub, export: Wanted, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (export.folder / "notes.txt").symlink_to(tmp_path / "secret")
    assert "notes.txt" not in upload(export) and "notes.txt" not in hub.files


def test_what_was_changed_or_came_to_lie_there_since_the_check_is_not_uploaded(
    hub: Hub, export: Wanted
) -> None:
    (export.folder / "notes.txt").write_text("mine")
    upload(export)
    assert "notes.txt" not in hub.files
    (export.folder / "adapter_model.safetensors").write_bytes(WEIGHTS[:-1])
    hub.seen.clear()
    assert "adapter_model.safetensors is not what was written" in upload(export) and not hub.seen
