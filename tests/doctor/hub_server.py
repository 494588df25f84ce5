"""A stand-in of the Hub for whoever fetches: it lists the files of its repositories and gives them, or a part."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT, BLOB = "a" * 40, "b" * 40
Repositories = dict[str, dict[str, bytes]]  # "models/owner/name" -> file -> what is in it


class Hub(ThreadingHTTPServer):
    """`gated` repositories list their files and give none; of a file in `cut` the first answer breaks off half-way."""

    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories = repositories
        self.gated: set[str] = set()
        self.cut: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(repositories: Repositories) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        if path.startswith(("api/models/", "api/datasets/")):
            kind, owner, name, *asked = path.split("/")[1:]
            return self._list(f"{kind}/{owner}/{name}", asked)
        at, _, rest = path.partition("/resolve/")
        key = at if at.startswith("datasets/") else f"models/{at}"
        self._give(key, rest.partition("/")[2])

    def _list(self, key: str, asked: list[str]) -> None:
        files = self.server.repositories.get(key)
        if files is None:
            return self._refuse(401, "RepoNotFound")
        sizes = {name: len(content) for name, content in files.items()}
        if asked[:1] == ["tree"]:
            folder = "/".join(asked[2:])
            found = [name for name in files if name.startswith(folder)]
            return self._json([{"type": "file", "path": n, "size": sizes[n], "oid": BLOB} for n in found])
        siblings = [{"rfilename": n, "size": size, "blobId": BLOB} for n, size in sizes.items()]
        card = {"license": "apache-2.0"}
        self._json(
            {"id": key.partition("/")[2], "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": []}
        )

    def _give(self, key: str, name: str) -> None:
        files = self.server.repositories.get(key)
        if files is None:
            return self._refuse(401, "RepoNotFound")
        if key in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        content, start = files[name], 0
        if range_ := self.headers.get("Range"):
            start = int(range_.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.server.cut:
            self.server.cut.remove(name)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
