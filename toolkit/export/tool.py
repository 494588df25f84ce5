"""Programs that an export has run for it: the consumer that checks it, llama.cpp's converter and its quantisation."""

from __future__ import annotations

import subprocess
import sys

# Asks Linux to kill it with its parent (PR_SET_PDEATHSIG, SIGKILL) and becomes the program. Not by a function between
# fork and exec: beside torch's threads that could wait for a lock which nobody holds any more.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


def tool(command: list[str], said: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a program answered to `said` on its standard input. It ends with this process, however that ends."""
    return subprocess.run(
        [sys.executable, "-S", "-E", "-c", _LAUNCH, *command],
        input=said,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
