"""The processes that train one run together, each on its own GPU, as a launcher started them.

torchrun and accelerate launch say it by the same variables (torch.distributed.run, "Environment Variables"). Needs no
torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from toolkit.errors import UserError, exit_code

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_SECONDS = 5  # in which the first process says the same, and a launcher ends the others for it


class OneOf:
    """One of `size` processes, counted from 0."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1


@dataclass(frozen=True)
class World(OneOf):
    """Which of `size` processes this one is, and of `local_size` on this machine; where the store of all is.

    `launcher_holds_store`: it was opened by the launcher; else the first process opens it. `attempt` tells apart the
    times that a launcher started them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    launcher_holds_store: bool = False
    attempt: str = "0"


ALONE = World()


def of(environ: Mapping[str, str]) -> World:
    """The world that a launcher describes; ALONE without one. Raises UserError for a description that is incomplete."""
    if environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    missing = [name for name in NAMES if not environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} and {', '.join(missing)} is not set: start the processes with "
            "`torchrun --standalone --nproc_per_node=N run_sft.py ...`, or unset WORLD_SIZE to train in one"
        )
    numbers = {name: environ[name] for name in NAMES if name != "MASTER_ADDR"}
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not value.isdigit()]:
        raise UserError(f"{', '.join(wrong)}: a launcher such as torchrun sets these to whole numbers")
    rank, size, local_rank, local_size, port = map(int, numbers.values())
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size}: a rank is "
            "smaller than its world; start the processes with torchrun"
        )
    return World(
        rank,
        size,
        local_rank,
        local_size,
        environ["MASTER_ADDR"],
        port,
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


# Which process says how a run ended ------------------------------------------------------------------------------

Told = Callable[[BaseException], int | None]


def _by_rank(world: World) -> Told:
    """While nothing connects the processes: what ends the first one ends them all, and it is the one that speaks."""

    def told(error: BaseException) -> int | None:
        if world.is_first or isinstance(error, SystemExit):
            return None
        if not isinstance(error, Exception):
            return exit_code(error)  # a signal, which the first one got too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LAUNCHER_SECONDS)  # the launcher's SIGTERM ends it, without a word
        return None

    return told


_told: Told = _by_rank(ALONE)
_here: World | None = None


def here() -> World:
    """That of this process; read once, because what follows it must not see a launcher's variables."""
    global _here, _told
    if _here is None:
        _here = of(os.environ)
        _told = _by_rank(_here)
    return _here


def tell_by(told: Told) -> None:
    """From now on `told` knows whether another process has told why all of them end."""
    global _told
    _told = told


def told_by_another(error: BaseException) -> int | None:
    """The exit code for this process where another one says how the run ended; None where this one has to."""
    return _told(error)
