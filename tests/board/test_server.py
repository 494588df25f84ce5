"""The board's server: who may ask, what it tells, and that votes alone are written."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.report.test_run_page import make_run
from tests.test_cli import mistake
from toolkit.board import serving
from toolkit.board.server import application
from toolkit.data.rows import Pair, to_item
from toolkit.data.schemas import recognise
from toolkit.files import write_json
from toolkit.records.record import read_lines
from toolkit.run.rundir import RunDir

ANSWERS = [
    ("Why?", "It rains.", "Of course. It rains."),
    ("Who?", "A newt.", "A newt."),
    ("Where?", "", "In Ivering."),
]


class Served:
    """A board in a thread of its own."""

    def __init__(self, root: Path, token: str | None = None):
        self._loop, started = asyncio.new_event_loop(), threading.Event()

        async def serve() -> None:
            from tornado.httpserver import HTTPServer

            [listening] = serving._bound("127.0.0.1", 0)
            self.port = listening.getsockname()[1]
            self._server = HTTPServer(application(root, token, set() if token else serving.LOOPBACK))
            self._server.add_sockets([listening])
            started.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert started.wait(20)
        self.url = f"http://localhost:{self.port}"

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of one recipe, with answers."""
    for name in ("dpo", "dpo-beta02"):
        run = make_run(tmp_path, name, 40, conditions={"sft_adapter": "abc"})
        write_json(run.report, {"outcome": "finished", "eval": {"loss": 0.5}})
        beta = 0.2 if "beta02" in name else 0.1
        (run.path / "recipe.resolved.yaml").write_text(
            f"description: a recipe\nseed: 1\ndpo: {{beta: {beta}}}\n"
        )
        rows = [
            {"prompt": p, "before": said(one), "after": said(f"{other}{beta}")} for p, one, other in ANSWERS
        ]
        (run.path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def said(text: str) -> dict[str, Any]:
    return {"text": text, "num_tokens": 3, "ended": True, "seconds": 0.1}


@pytest.fixture
def served(runs: Path) -> Iterator[Served]:
    served = Served(runs)
    yield served
    served.close()


CHOSEN = "run=big/dpo&run=big/dpo-beta02"


def test_what_is_told_of_runs(served: Served, runs: Path) -> None:
    told = served.get("/api/runs")
    assert {row["name"] for row in told.json()} == {"big/dpo", "big/dpo-beta02"}
    assert served.get("/api/runs", **{"If-None-Match": told.headers["Etag"]}).status_code == 304
    assert served.get(f"/api/differences?{CHOSEN}").json() == [["dpo.beta", ["0.1", "0.2"]]]
    details = served.get("/api/run?run=big/dpo").json()
    assert "Direct preference optimisation of big" in details["html"]
    RunDir(runs, "big", "dpo").log.write_text("first\nHF token=hf_" + "a" * 34 + "\n")
    assert served.get("/api/run?run=big/dpo").json()["log"] == "first\nHF token=***\n"


def test_a_run_that_begins_and_one_that_ends_are_told(served: Served, runs: Path) -> None:
    assert len(served.get("/api/runs").json()) == 2
    run = make_run(runs, "sft", 5)
    assert [row["cells"][1] for row in served.get("/api/runs").json() if row["name"] == "big/sft"] == [
        "finished"
    ]
    write_json(run.manifest, {"outcome": "failed", "reason": "no room"})
    assert [row["cells"][1] for row in served.get("/api/runs").json() if row["name"] == "big/sft"] == [
        "failed"
    ]


def test_curves_are_sent_whole_once_and_then_as_they_grow(served: Served, runs: Path) -> None:
    whole = served.get(f"/api/curves?{CHOSEN}").json()
    assert whole["documents"] and [title["title"] for title in whole["titles"]][:2] == [
        "Loss",
        "Reward margin",
    ]
    with RunDir(runs, "big", "dpo").metrics.open("a") as stream:
        stream.write("\n" + json.dumps({"step": 41, "loss": 0.25}) + "\n" + '{"step": 42, "lo')
    grown = served.get(f"/api/curves?{CHOSEN}&shape={whole['shape']}").json()
    assert "documents" not in grown
    assert (
        grown["columns"]["big/dpo loss"]["step"][-1] == 41
        and grown["columns"]["big/dpo loss"]["value"][-1] == 0.25
    )
    assert len(grown["columns"]["big/dpo-beta02 loss"]["step"]) == 40
    assert grown["steps"][1] > whole["steps"][1]


@pytest.mark.parametrize(
    "path",
    [
        "/files/../../../../etc/passwd",
        "/files/%2e%2e/%2e%2e/etc/passwd",
        "/files/big/dpo/manifest.json",
        "/files//etc/report.html",
        "/api/run?run=../big/dpo",
        "/api/run?run=big/../../etc",
        "/api/curves?run=big/none",
        "/api/curves?" + "&".join(f"run=big/dpo-{number}" for number in range(9)),
        "/answers?run=big/dpo&run=other/dpo",
        "/elsewhere",
    ],
)
def test_nothing_else_is_told(served: Served, path: str) -> None:
    answer = served.get(path)
    assert answer.status_code in (400, 404) and "root:" not in answer.text and "outcome" not in answer.text


def test_a_site_elsewhere_can_neither_read_nor_vote(served: Served) -> None:
    assert served.get("/api/runs", Host=f"evil.example:{served.port}").status_code == 403
    assert httpx.post(f"{served.url}/answers?{CHOSEN}", json=[[0, 1]], timeout=60).status_code == 403
    policy = served.get("/").headers["Content-Security-Policy"]
    assert (
        "default-src 'none'" in policy
        and "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    )


def test_others_are_asked_for_a_token(runs: Path) -> None:
    served = Served(runs, token="t0ken-of-some-length")
    try:
        assert served.get("/api/runs").status_code == 401 and served.get("/?token=wrong").status_code == 401
        with httpx.Client(base_url=served.url, timeout=60) as client:
            first = client.get("/?token=t0ken-of-some-length")
            assert first.status_code == 302 and first.headers["Location"] == "/"
            cookie = first.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
            assert len(client.get("/api/runs").json()) == 2
    finally:
        served.close()


def test_votes_become_pairs_on_disk_and_are_there_again(served: Served, runs: Path) -> None:
    page = served.get(f"/answers?{CHOSEN}").text
    [identity] = re.findall(r'"id": "(\w+)"', page)
    assert '"names": ["sft", "dpo", "dpo-beta02"]' in page and '"cast": []' in page

    def vote(cast: Any, votes: str = identity) -> httpx.Response:
        return httpx.post(f"{served.url}/answers?{CHOSEN}", json=cast, headers={"X-Votes": votes}, timeout=60)

    said = vote([[0, 2], [1, "tie"], [2, 1], [2, None]])
    file = runs / "big" / "votes" / f"{identity}.jsonl"
    assert said.text == f"2 pairs in {file}"
    pairs = list(read_lines(file))
    assert [pair["rejected_model"] for pair in pairs] == ["sft", "dpo"]
    schema = recognise(pairs[0], "pair", pairs[0])
    read = to_item(pairs[0], "pair", schema)
    assert isinstance(read, Pair) and read.chosen[-1]["content"] == "Of course. It rains.0.2"
    assert '"cast": [[0, 2], [1, "tie"], [2, 1], [2, null]]' in served.get(f"/answers?{CHOSEN}").text
    assert (
        vote([[0, 7]]).status_code == 400
        and vote([[9, 0]]).status_code == 400
        and vote({}).status_code == 400
    )
    assert "have changed" in vote([[0, 1]], "other").text
    assert vote([]).text.startswith("0 pairs") and file.read_text() == ""


def test_what_cannot_be_served_is_one_message(runs: Path, tmp_path: Path) -> None:
    [taken] = serving._bound("127.0.0.1", 0)
    port = taken.getsockname()[1]
    said = mistake("board", "--runs", runs, "--port", port, light=True)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; take another --port" in said
    assert "there is no folder" in mistake("board", "--runs", tmp_path / "none", light=True)
    assert "is no port" in mistake("board", "--port", "99999", light=True)
    taken.close()
