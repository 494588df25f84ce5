"""Several processes that train one run, as a launcher would start them."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS
from tests.engine.scripts import Script


def start(
    stage: str,
    runs: Path,
    *overrides: str,
    size: int = 2,
    options: Sequence[str] = (),
    last: Sequence[str] = (),
    in_all: Sequence[str] = (),
    in_last: Sequence[str] = (),
) -> list[Script]:
    """`size` processes of run_<stage>.py; the last one has options of its own (`last`) beside the others'.

    `in_all` are circumstances of tests.engine.driven in which they run, `in_last` others of the last process.
    """
    port = _free_port()
    words = [word for override in (*FEW_ROWS, *overrides) for word in ("--set", override)]
    words = ["--recipe", "tiny", "--runs", str(runs), *words, *options]
    runs.mkdir(parents=True, exist_ok=True)
    scripts = []
    for rank in range(size):
        is_last = rank == size - 1
        circumstances = [*in_all, *(in_last if is_last else ())]
        driven = ["tests.engine.driven", ",".join(circumstances), stage]
        script = driven if circumstances else [str(ROOT / f"run_{stage}.py")]
        world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        environ = {name: str(value) for name, value in world.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        said = runs / f"{stage}.{rank}.said"
        scripts.append(Script([*script, *words, *(last if is_last else ())], said, environ=environ))
    return scripts


def end(scripts: Sequence[Script], seconds: float = 240) -> list[int]:
    """Their exit codes, once all have ended."""
    until = time.monotonic() + seconds
    return [script.wait(max(0.1, until - time.monotonic())) for script in scripts]


def said(scripts: Sequence[Script]) -> str:
    return "\n".join(script.said() for script in scripts)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
