"""Commands in process groups of their own, and the rule by which their ends are judged."""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LONGEST_SECONDS = 1800  # a command that takes longer hangs
Jump = tuple[float, float]  # seconds by which the clock is moved, and the second of the run at which it is


class Running:
    """A command in a process group of its own: as its script, or in a fork of this process."""

    def __init__(
        self, words: list[str], folder: Path, cache: Path, as_script: bool, jump: Jump | None = None
    ):
        self.words, self.seconds = words, 0.0
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        self.code: int | None = None
        self.out.write_text("")
        self.err.write_text("")
        environment = {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        self.started = time.monotonic()
        if as_script:
            with self.out.open("w") as out, self.err.open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    env=os.environ | environment,
                )
            self.pid = process.pid
            process.returncode = 0  # it is reaped here
            return
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self.pid = os.fork()  # until the fork takes signals as a script does, none reaches it
        if self.pid == 0:
            _become(words, environment, self.out, self.err, jump)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.started
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(0.02)
        return True

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def leaves_children(self) -> bool:
        """Whether another process of its group outlives it by more than a few seconds."""
        for _ in range(100):
            if not any(_is_of(process, self.pid) for process in psutil.process_iter()):
                return False
            time.sleep(0.1)
        return True

    def wrong(self, allowed: tuple[int, ...]) -> str | None:
        """What of the rule its end breaks, short of what it left."""
        return judged(self.code, allowed, self.said())

    def said(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")


def _is_of(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def judged(code: int | None, allowed: tuple[int, ...], said: str) -> str | None:
    """What of the rule an exit code and what was printed break; None for nothing."""
    if code is None:
        return f"still running after {LONGEST_SECONDS} s"
    if "Traceback" in said or "internal error" in said:
        return f"exit {code} with a traceback"
    if code not in allowed:
        return f"exit {code}, allowed are {', '.join(map(str, allowed))}"
    if code == 2 and "error: " not in said:
        return "exit 2 without a message"
    return None


def _become(words: list[str], environment: dict[str, str], out: Path, err: Path, jump: Jump | None) -> None:
    """The rest of a forked process's life: a script, as if it had been started."""
    code: Any = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the campaign
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        os.environ.update(environment)
        if jump is not None:
            _jump(*jump)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except KeyboardInterrupt:  # before the script could say how it takes one
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _jump(seconds: float, moment: float) -> None:
    """Moves the clock that Python tells, so many seconds into the run; the machine's own is everybody's."""
    real, then = time.time, time.monotonic() + moment
    time.time = lambda: real() + (seconds if time.monotonic() > then else 0)
