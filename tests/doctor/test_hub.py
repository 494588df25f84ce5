"""The Hub's answers, from a server on this machine, and its cache, in folders laid out as the libraries do."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from toolkit.doctor import hub
from toolkit.doctor.hub import Answer, Repository

SECRET = "hf_" + "a1B2" * 8
MODEL = Repository("model", "owner/Name-7b")
ROWS = Repository("data set", "owner/Some-Rows_v2")
GATED, ELSEWHERE = Repository("model", "owner/gated"), Repository("model", "owner/elsewhere")
ANSWERS = {
    MODEL: (200, ""),
    ROWS: (404, "EntryNotFound"),  # a data set without a README
    GATED: (403, "GatedRepo"),
    ELSEWHERE: (307, ""),
    Repository("model", "owner/name", "v9"): (404, "RevisionNotFound"),
    Repository("model", "owner/mispelt"): (401, "RepoNotFound"),
}


class Server(BaseHTTPRequestHandler):
    tokens: ClassVar[set[str | None]] = set()

    def do_HEAD(self) -> None:
        self.tokens.add(self.headers.get("Authorization"))
        status, code = next(
            (answer for one, answer in ANSWERS.items() if one.url.endswith(self.path)), (500, "")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:1/never-asked")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield url
        listening.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_repository_gets_the_hubs_answer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    answers = hub.ask({one.path: one.url for one in ANSWERS})
    fixes = {path: answer.problem for path, answer in answers.items()}
    assert [path for path, fix in fixes.items() if fix is None] == [MODEL.path, ROWS.path, ELSEWHERE.path]
    assert "accept its licence" in str(fixes["owner/gated"])
    assert "no such revision" in str(fixes["owner/name"])
    assert "check the spelling" in str(fixes["owner/mispelt"])
    assert Server.tokens == {f"Bearer {SECRET}"}


def test_who_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(hub, "SECONDS", 0.2)
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        assert hub.ask({"hub": url, "model": url}) == dict.fromkeys(("hub", "model"), hub.UNREACHABLE)
        assert time.monotonic() - started < 30, "a hang, not a limit of speed"


def test_a_model_in_the_cache_is_one_with_all_its_weights(cache: Path) -> None:
    folder = cache / "hub" / "models--owner--Name-7b"
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    (snapshot / "config.json").write_text("{}")
    assert hub.cached_gib(MODEL) is None
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / names[0]).write_bytes(bytes(1000))
    assert hub.cached_gib(MODEL) is None
    (snapshot / names[1]).write_bytes(bytes(24))
    assert hub.cached_gib(MODEL) == 2**-20
    assert hub.cached_gib(Repository("model", MODEL.path, "abc123")) == 2**-20
    assert hub.cached_gib(Repository("model", MODEL.path, "another")) is None
    assert hub.repository(MODEL, None).status == "ok"


def test_rows_in_the_cache(cache: Path) -> None:
    assert hub.cached_gib(ROWS) is None
    table = cache / "datasets" / "owner___some-rows_v2" / "default" / "0.0.0" / "abc" / "rows-train.arrow"
    table.parent.mkdir(parents=True)
    table.write_bytes(bytes(1024))
    assert hub.cached_gib(ROWS) == 2**-20


def test_what_is_neither_cached_nor_reachable_stops_a_run() -> None:
    assert hub.repository(MODEL, Answer(None, 0.1)).found.endswith("will be fetched")
    assert hub.repository(MODEL, hub.UNREACHABLE).status == "fail"
    offline = hub.repository(MODEL, None)
    assert offline.status == "fail" and "HF_HUB_OFFLINE is set" in str(offline.fix)


def test_a_hub_that_is_away_stops_nothing_by_itself() -> None:
    assert hub.hub(hub.UNREACHABLE).status == "warn"
    assert hub.hub(Answer(None, 0.1)).status == hub.hub(None).status == "ok"


def test_tokens_are_named_and_never_shown(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.tokens().found == "none of HF_TOKEN, WANDB_API_KEY"
    (cache / "token").write_text(SECRET)
    assert hub.tokens().found == "a login at the Hub set"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert hub.tokens().found == "HF_TOKEN, WANDB_API_KEY set"
