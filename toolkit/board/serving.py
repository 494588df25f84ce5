"""How the board is started: options, address, token."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import threading
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit import command, env
from toolkit.errors import UserError

PORT = 8765
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
TOKEN_BYTES = 24
TOKEN_VARIABLE, TOKEN_FILE = "FINETUNE_BOARD_TOKEN", "board_token"


def parse(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=command.RUNS, metavar="DIR", help="where the runs are")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for every one")
    parser.add_argument("--port", type=_port, default=PORT, help=f"default {PORT}; 0 takes a free one")
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def serve(arguments: argparse.Namespace, console: Console) -> None:
    """Until Ctrl-C or SIGTERM. Raises UserError where it cannot listen there."""
    if not arguments.runs.is_dir():
        raise UserError(
            f"no runs: there is no folder {arguments.runs.absolute()}; name where they are with --runs DIR"
        )
    is_open = not _is_loopback(arguments.host)
    sockets = _bound(arguments.host, arguments.port)
    port = sockets[0].getsockname()[1]
    token = _token() if is_open else None
    host = arguments.host if not is_open or arguments.host not in ("0.0.0.0", "::") else socket.gethostname()
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (f"?token={token}" if token else "")
    console.print(f"[bold green]board[/] {escape(address)}", soft_wrap=True)
    if is_open:
        console.print(
            "[yellow]others can reach it: without encryption, unless a proxy adds that. Who has the address above, "
            "token and all, sees the runs and can vote[/]",
        )
    console.print("[dim]Ctrl-C ends it; runs go on without it[/]")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_forever(arguments.runs, token, sockets))


async def _forever(root: Path, token: str | None, sockets: list[socket.socket]) -> None:
    from tornado.httpserver import HTTPServer  # half a second that no other module pays

    from toolkit.board.server import MOST_BYTES, application
    from toolkit.report import figures

    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    server = HTTPServer(
        application(root, token, set() if token else LOOPBACK), max_body_size=MOST_BYTES, xheaders=False
    )
    server.add_sockets(sockets)
    threading.Thread(
        target=figures.library, daemon=True
    ).start()  # Bokeh takes a second: before somebody waits for it
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    server.stop()


def _bound(host: str, port: int) -> list[socket.socket]:
    from tornado.netutil import bind_sockets

    try:
        return bind_sockets(port, host)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; take another --port, 0 for a free one, or --host"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token() -> str:
    """The one that is exported, else the one of before, so that a browser stays signed in; its file is the user's."""
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    file = env.cache_folder() / TOKEN_FILE
    with contextlib.suppress(OSError):
        if kept := file.read_text().strip():
            return kept
    token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(token + "\n")
    except OSError:
        pass  # another one at the next start
    return token
