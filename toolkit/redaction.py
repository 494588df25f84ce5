"""Nothing that a run writes holds a token, a key or a password: the one place that knows what they look like."""

from __future__ import annotations

import os
import re
from typing import Any

# Hub tokens, API keys, and the credentials inside an address.
SHAPES = re.compile(r"hf_\w{8,}|sk-[\w-]{8,}|(?<=://)[^/\s@]+(?=@)")
# Whatever an option or an assignment gives to a name that says so (a template's pad_token is none); and HTTP headers.
WORDS = r"(?i:(?<!pad_)(?<!eos_)(?<!bos_)token|secret|password|passwd|api[_-]?key)"
NAMED = re.compile(rf"(--\S*{WORDS}[= ]|{WORDS}\s*=\s*|(?i:bearer |basic ))\S+")
NAMES = re.compile(r"TOKEN$|TOKEN_|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL")
SHORTEST = 6  # of what counts as a secret in the environment: "1" or "false" would blank half of a manifest


def redacted(text: str) -> str:
    """A command line or a message without secrets, whether given in it or in the environment."""
    return NAMED.sub(r"\1***", blanked(text))


def blanked(value: Any) -> Any:
    """The same text, or tree of dicts and lists, without what has the shape of a secret or is one of ours."""
    if isinstance(value, str):
        for secret in _of_environment():
            value = value.replace(secret, "***")
        return SHAPES.sub("***", value)
    if isinstance(value, dict):
        return {key: blanked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [blanked(item) for item in value]
    return value


def _of_environment() -> list[str]:
    """Values of variables whose name says that they are secret, longest first; plain numbers are limits."""
    values = {value for name, value in os.environ.items() if NAMES.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST and not value.isdigit()), key=len)[
        ::-1
    ]
