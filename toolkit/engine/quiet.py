"""Silence for libraries: banners, advice and progress bars that say nothing a run's own lines do not."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator

from toolkit.errors import UserError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what libraries print and warn in the block; shown after all when it fails for no known reason."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if not isinstance(error, UserError):
            sys.stderr.write(said.getvalue())
        raise
