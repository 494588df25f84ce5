"""A program that an export has run for it ends with the export, however that ends."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from toolkit.export.tool import tool


def test_what_it_answered_is_text_in_any_locale() -> None:
    done = tool([sys.executable, "-c", "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"], "é")
    assert (done.stdout, done.returncode) == ("é", 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_gone_once_the_export_is(number: int) -> None:
    code = "from toolkit.export.tool import tool; tool(['sleep', '600'])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (children := psutil.Process(parent.pid).children()) or children[0].name() != "sleep":
        time.sleep(0.01)
    parent.send_signal(number)
    parent.wait()
    gone, _ = psutil.wait_procs(children, timeout=60)
    assert gone or children[0].status() == psutil.STATUS_ZOMBIE
