"""Chat templates: messages -> text, as transformers' `apply_chat_template` does it, without transformers.

Two differences, on purpose: `strftime_now` always answers with FIXED_DATE, so that a render is the same
tomorrow, and a template's own refusal is one exception, `TemplateRefused`.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.errors import UserError

_MARKER = re.compile(r"<\|\w+\|>|<\w+_of_turn>")
FIXED_DATE = datetime(2024, 7, 26)  # the date that the Llama-3.1 template itself falls back to


class TemplateRefused(Exception):
    """The template raised on these messages (a role it does not know, a missing field): its own words."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the two tokens it may name. Three strings: hashable, and cheap to pickle.

    Compiled once per process and source. `None` leaves a token undefined, which templates render as nothing.
    Raises UserError where the source is not Jinja.
    """

    source: str
    bos_token: str | None = None
    eos_token: str | None = None

    def __post_init__(self) -> None:
        _compile(self.source)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """Messages of {"role", "content"} -> text, BOS included where the template writes it.

        Raises TemplateRefused when the template raises.
        """
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        given = {name: token for name, token in names.items() if token is not None}
        try:
            return _compile(self.source).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **given,
            )
        except (
            Exception
        ) as error:  # a division by zero, say: whatever its expressions raise on these messages
            raise TemplateRefused(str(error) or type(error).__name__) from error

    def without_trailing_blank(self) -> "ChatTemplate":
        """The same template, whose generation prompt ends before the blanks that belong to the reply's first word.

        Whoever renders it then gives a model the tokens that training saw (see masking.py), by any engine.
        """
        try:
            asked = self.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
        except TemplateRefused:
            return self
        if not asked.endswith(" "):
            return self
        return self._then("rendered.rstrip(' ') if add_generation_prompt else rendered")

    def ending_with(self, end_of_turn: str) -> "ChatTemplate":
        """The same template, whose conversations end with the token that closes the last reply.

        What some write behind it, ChatML's line feed, training does not see: a score would be read off another token.
        """
        try:
            told = self.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
        except TemplateRefused:
            return self
        if told.endswith(end_of_turn) or end_of_turn not in told:
            return self
        end = json.dumps(end_of_turn)
        return self._then(
            f"rendered if add_generation_prompt or {end} not in rendered else rendered.rpartition({end})[0] + {end}"
        )

    def _then(self, expression: str) -> "ChatTemplate":
        """This template, and of what it `rendered` the value of a Jinja expression."""
        body = self.source.removesuffix("\n")  # as Jinja itself does
        # Jinja takes the line feed behind the block away
        source = f"{{% set rendered %}}\n{body}{{%+ endset %}}{{{{ {expression} }}}}"
        return dataclasses.replace(self, source=source)

    def special_tokens(self, added_tokens: Iterable[str]) -> list[str]:
        """Those of the tokenizer's `added_tokens` that this template itself writes, in the order given.

        Looks at literal text, string constants, and the names `bos_token` and `eos_token`; not at comments.
        """
        written = self._literals()
        used = meta.find_undeclared_variables(_environment().parse(self.source))
        named = {getattr(self, name) for name in ("bos_token", "eos_token") if name in used}
        return [token for token in added_tokens if token in named or any(token in text for text in written)]

    def markers(self) -> list[str]:
        """What the template writes around turns and looks like a token, in ordinary text or not: <|im_start|>."""
        return sorted({marker for text in self._literals() for marker in _MARKER.findall(text)})

    def _literals(self) -> list[str]:
        tree = _environment().parse(self.source)
        written = [node.data for node in tree.find_all(nodes.TemplateData)]
        return written + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def read_template(path: str | Path, looked_in: str = "") -> str:
    """The source of a .jinja file. Raises UserError where it cannot be read as text; `looked_in` says where it was
    looked for."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no chat template {path}{looked_in}. Name a .jinja file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"No chat template at {path}: {error}. Name a .jinja file in UTF-8.") from error


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks trained text for transformers; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (typed so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(list(body), lineno=line)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    try:
        template = _environment().from_string(source)
        # Each render copies them, half of its time with Jinja's own ChainMap, which looks every key up anew
        template.globals = dict(template.globals)
        return template
    except jinja2.TemplateSyntaxError as error:
        problem = f"The chat template is not valid Jinja: line {error.lineno}: {error.message}"
        raise UserError(problem) from error
    except (ValueError, OverflowError, RecursionError, SyntaxError, MemoryError) as error:
        raise UserError(f"The chat template cannot be compiled: {type(error).__name__}: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which would change the text."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
