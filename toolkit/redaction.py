"""Nothing that a run writes for readers holds a token, a key or a password: the one place that knows them.

Blanked is what is known to be a secret: the value of a variable whose name says so, a token of the length and alphabet
of its kind, what an option or a header names as one. Files that programs load are never rewritten. In what tells one
run from another a secret becomes a mark of its own, so that two runs stay two.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

# Tokens as their issuers make them: Hugging Face, GitHub, AWS, OpenAI, Anthropic, GitLab, Slack.
TOKENS = (
    r"(?:hf|api_org)_[A-Za-z0-9]{34}",
    r"gh[opsur]_[A-Za-z0-9]{36}",
    r"github_pat_[A-Za-z0-9_]{82}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"sk-[A-Za-z0-9]{48}",
    r"sk-(?:proj|svcacct|ant)-[A-Za-z0-9_-]{40,}",
    r"glpat-[A-Za-z0-9_-]{20}",
    r"xox[abprs]-[A-Za-z0-9-]{20,}",
)
# And the credentials inside an address: a user and a password, which may hold any character, or a token alone; the
# path of a Slack or Discord webhook, which is all that it takes to write there.
SHAPES = re.compile(
    rf"(?<![A-Za-z0-9])(?:{'|'.join(TOKENS)})(?![A-Za-z0-9])"
    r"|(?<=://)[^/\s:@]+:(?!\d+(?:/|$))\S+(?=@)|(?<=://)[^/\s@]+(?=@)"
    r"|(?<=://hooks\.slack\.com/)[\w/-]+|(?<=://discord\.com/api/webhooks/)[\w/-]+"
)
# Whatever an option, an assignment or a mapping gives to a name that says so (a template's pad_token is none); headers.
TEXT = r"(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!special_)"
WORDS = rf"(?i:{TEXT}token|secret|password|passwd|api[_-]?key)"
# In prose a colon is none: "is an end token: ..."
MAPPED = rf"(?:(?m:^)\s*|[{{,\"'_.-]\s*){WORDS}[\"']?\s*:\s*"
NAMED = re.compile(rf"(--\S*{WORDS}[= ]|{WORDS}\s*=\s*|{MAPPED}|(?i:bearer |basic ))\S+")
NAMES = re.compile(
    rf"{TEXT}TOKEN$|{TEXT}TOKEN_|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL",
    re.IGNORECASE,
)
SHORTEST = 6  # of what counts as a secret in the environment: "1" or "false" would blank half of a manifest
BLANK = "***"
# Keys of records whose values tell one run, base or export from another.
IDENTITY = ("trajectory", "conditions", "files", "base", "base_model", "base_16bit", "revision", "recipe")


def redacted(text: str) -> str:
    """A command line or a message without secrets, whether given in it or in the environment."""
    return NAMED.sub(rf"\1{BLANK}", blanked(text))


def blanked(value: Any) -> Any:
    """The same text, or tree of dicts and lists, without what is a secret; under IDENTITY keys as `marked`."""
    return _without(_of_environment(), value)


def _without(secrets: list[str], value: Any) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, BLANK)
        return SHAPES.sub(BLANK, value)
    if isinstance(value, dict):
        return {
            key: marked(item) if key in IDENTITY else _without(secrets, item) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without(secrets, item) for item in value]
    return value


def marked(value: Any) -> Any:
    """As `blanked`, the same in every environment, and different for different secrets."""
    if isinstance(value, str):
        return SHAPES.sub(_mark, value)
    if isinstance(value, dict):
        return {key: marked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [marked(item) for item in value]
    return value


def _mark(secret: re.Match[str]) -> str:
    return BLANK + hashlib.blake2b(secret[0].encode(), digest_size=4).hexdigest()


def _of_environment() -> list[str]:
    """Values of variables whose name says that they are secret, longest first; plain numbers are limits."""
    values = {value for name, value in os.environ.items() if NAMES.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST and not value.isdigit()), key=len)[
        ::-1
    ]
