"""The board's web server: what a page asks for, and nothing else. Reads runs, writes votes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado import web

from toolkit.board import runs
from toolkit.board.answers import side_by_side
from toolkit.board.runs import Board
from toolkit.errors import UserError
from toolkit.redaction import blanked
from toolkit.report import figures, html, run_page

HERE = Path(__file__).parent
COOKIE, TOKEN = "board", "token"
MOST_BYTES = 2**20  # of a request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


def application(root: Path, token: str | None, hosts: set[str]) -> web.Application:
    """`token` is asked of everyone where it is set, `hosts` are the names that the page may be reached by (empty: any):
    a site elsewhere whose name is made to point here is none of them."""
    board, work = Board(root), ThreadPoolExecutor(1)
    work.submit(board.listed)  # a thousand runs take a second: before somebody asks
    shared = {"board": board, "token": token, "hosts": hosts, "work": work}
    return web.Application(
        [
            (r"/", Page, shared),
            (r"/(board\.js|board\.css|figures\.js|bokeh\.js)", Asset, shared),
            (r"/api/runs", Runs, shared),
            (r"/api/curves", Curves, shared),
            (r"/api/differences", Differences, shared),
            (r"/api/run", Run, shared),
            (r"/answers", Answers, shared),
            (r"/files/(.+)", Files, shared),
        ],
        default_handler_class=Nothing,
        default_handler_args=shared,
        compress_response=True,
    )


class Handler(web.RequestHandler):
    """What every answer has: who may ask, and what a browser may do with it."""

    def initialize(self, board: Board, token: str | None, hosts: set[str], work: ThreadPoolExecutor) -> None:
        self.board, self._token, self._hosts, self._work = board, token, hosts, work

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        if self._hosts and urlsplit(f"//{self.request.host}").hostname not in self._hosts:
            raise web.HTTPError(403, "not the name that this board was started under")
        if self._token is None:
            return
        given = self.get_query_argument(TOKEN, None)
        if given is not None and hmac.compare_digest(given.encode(), self._token.encode()):
            is_https = self.request.headers.get("X-Forwarded-Proto", self.request.protocol) == "https"
            self.set_cookie(
                COOKIE, self._token, httponly=True, samesite="Strict", secure=is_https, expires_days=30
            )
            self.redirect(self.request.path)  # the token is in no history
        elif not hmac.compare_digest((self.get_cookie(COOKIE) or "").encode(), self._token.encode()):
            raise web.HTTPError(401)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        said = {
            401: "a token is asked for: open the address that run_board.py has shown",
            404: "there is no such page",
        }
        error = kwargs.get("exc_info", (None, None, None))[1]
        reason = (
            "; ".join(error.problems) if isinstance(error, UserError) else said.get(status_code, self._reason)
        )
        self.set_status(400 if isinstance(error, UserError) else status_code)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(blanked(reason))

    def log_exception(self, kind: Any, value: Any, traceback: Any) -> None:
        if not isinstance(value, UserError):
            super().log_exception(kind, value, traceback)

    async def off_loop(self, work: Any, *arguments: Any) -> Any:
        """In the one thread that reads: a slow disk keeps nobody's socket waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._work, work, *arguments)

    def names(self) -> list[str]:
        return self.get_query_arguments("run")

    async def answer(self, work: Any, *arguments: Any) -> None:
        """JSON, and nothing but 304 where the page has it already."""
        text = await self.off_loop(lambda: json.dumps(work(*arguments), ensure_ascii=False))
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("Etag", f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"')
        if self.check_etag_header():
            self.set_status(304)
            return
        self.write(text)


class Nothing(Handler):
    def get(self) -> None:
        raise web.HTTPError(404)


class Page(Handler):
    def get(self) -> None:
        self.write((HERE / "board.html").read_text(encoding="utf-8"))


class Asset(Handler):
    async def get(self, name: str) -> None:
        kind = "css" if name.endswith(".css") else "javascript"
        self.set_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.write(await self.off_loop(_asset, name))


class Runs(Handler):
    async def get(self) -> None:
        await self.answer(self.board.listed)


class Curves(Handler):
    async def get(self) -> None:
        await self.answer(self.board.curves, self.names(), self.get_query_argument("shape", ""))


class Differences(Handler):
    async def get(self) -> None:
        await self.answer(self.board.differences, self.names())


class Run(Handler):
    async def get(self) -> None:
        await self.answer(self.board.details, self.get_query_argument("run"))


class Answers(Handler):
    """The comparison's page of chosen runs; it sends its votes here."""

    async def get(self) -> None:
        found = await self.off_loop(lambda: side_by_side(self.board.of_one_recipe(self.names())).page())
        self.set_header(
            "Content-Security-Policy", "frame-ancestors 'self'"
        )  # the page has a policy of its own
        self.write(found)

    async def post(self) -> None:
        """A form of another site can send no header of ours."""
        if "X-Votes" not in self.request.headers or len(self.request.body) > MOST_BYTES:
            raise web.HTTPError(403, "votes come from the board's own page")

        def keep() -> str:
            found = side_by_side(self.board.of_one_recipe(self.names()))
            if found.id != self.request.headers["X-Votes"]:
                raise UserError("the answers have changed since the page was opened: open it again")
            num = found.keep(json.loads(self.request.body))
            return f"{num:,} pair{'s' * (num != 1)} in {found.folder / found.id}.jsonl"

        try:
            self.write(await self.off_loop(keep))
        except ValueError:
            raise UserError("these are no votes") from None


class Files(Handler):
    """The reports that runs leave."""

    async def get(self, path: str) -> None:
        file = runs.inside(self.board.root, path)
        if file is None or file.name != "report.html":
            raise web.HTTPError(404)
        self.set_header("Content-Security-Policy", "frame-ancestors 'self'")  # it has a policy of its own
        self.write(await self.off_loop(file.read_bytes))


@cache
def _asset(name: str) -> str:
    if name == "bokeh.js":
        return figures.library()
    if name == "board.css":
        return html.PALETTE + run_page.STYLE + (HERE / name).read_text(encoding="utf-8")
    return (figures.SCRIPT if name == "figures.js" else HERE / name).read_text(encoding="utf-8")
