"""Programs that an export has run for it: the consumer that checks it, llama.cpp's converter and its quantisation."""

from __future__ import annotations

import ctypes
import signal
import subprocess

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def tool(command: list[str], said: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a program answered to `said` on its standard input. It ends with this process, however that ends."""
    return subprocess.run(
        command,
        input=said,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
