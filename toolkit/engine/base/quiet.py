"""Silence for libraries: what they print goes to log.txt line by line; see `toolkit.runlog`."""

import contextlib
import io
import sys
from collections.abc import Iterator

from toolkit.errors import Interrupted, UserError
from toolkit.run.runlog import LOG, PRINTED


class _Printed(io.TextIOBase):
    """A stream whose lines become log lines; of a bar that draws over itself the last state counts."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest.rpartition("\r")[2] or rest[-1000:]
        for line in lines:
            if said := line.rstrip("\r").rpartition("\r")[2].strip():
                PRINTED.info("%s", said)
        return len(text)

    def finish(self) -> None:
        self.write("\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends what is printed in the block to log.txt.

    When the block fails for no known reason before there is a log.txt, what libraries said so far is shown after all.
    """
    said, warned = _Printed(), _Printed()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
            try:
                yield
            finally:
                said.finish()
                warned.finish()
    except Exception as error:
        if LOG.path is None and not isinstance(error, (UserError, Interrupted)):
            sys.stderr.write(LOG.unseen())
        raise
