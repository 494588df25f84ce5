"""Fine-tuning and aligning a language model on one GPU.

Every script imports this before any package, so here stands what a Python without them can still run, 3.9 too: it says
in one line which interpreter to take.
"""

import os
import shlex
import sys
from importlib.util import find_spec

OLDEST = (3, 11)
NEEDED = ("rich", "pydantic", "jinja2")  # of requirements.txt, what is imported first


def _check_interpreter() -> None:
    lacks = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info >= OLDEST and not lacks:
        return
    found = ".".join(map(str, sys.version_info[:2])) + (f" without {', '.join(lacks)}" if lacks else "")
    python = os.path.join(os.path.dirname(sys.argv[0]), ".venv", "bin", "python")
    take = "take" if os.access(python, os.X_OK) else "run `make setup` first, then"
    sys.stderr.write(
        f"error: {sys.executable} is Python {found}; 3.11 to 3.13 with the packages is needed: {take} "
        f"`{' '.join(map(shlex.quote, [python, *sys.argv]))}`\n"
    )
    sys.exit(2)


if os.path.basename(sys.argv[0]).startswith("run_"):
    _check_interpreter()
