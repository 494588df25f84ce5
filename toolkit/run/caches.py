"""The caches that runs share: where prepared rows and reference log-probs lie, and what their entries are called.

The engine fills them. The time of an entry is when it was last used. It may be deleted at any time, and is made again.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import env

LOG_PROBS = ".logps"  # ends an entry of log-probs, a file; an entry of rows is a folder
MAKING = ".making-"  # begins a folder of rows that is being written, or was when its process died
ABANDONED_SECONDS = 24 * 3600  # after which nobody writes there any more


def prepared_rows() -> Path:
    return env.cache_folder() / "data"


def log_probs() -> Path:
    return env.cache_folder() / "reference"
