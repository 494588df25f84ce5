"""A program that an export has run for it ends with the export, however that ends."""

import os
import signal
import sys
import time

import psutil
import pytest

from toolkit.engine.export.tool import tool


def test_what_it_answered_is_text_in_any_locale() -> None:
    done = tool([sys.executable, "-c", "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"], "é")
    assert (done.stdout, done.returncode) == ("é", 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_gone_once_the_export_is(number: int) -> None:
    parent = os.fork()
    if parent == 0:
        tool(["sleep", "600"])
    while not (children := psutil.Process(parent).children()) or children[0].name() != "sleep":
        time.sleep(0.01)
    os.kill(parent, number)
    os.waitpid(parent, 0)
    gone, _ = psutil.wait_procs(children, timeout=60)
    assert gone or children[0].status() == psutil.STATUS_ZOMBIE
