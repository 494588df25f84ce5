"""A chat template as Ollama's Modelfile: Go's text/template instead of Jinja, and the tokens that end an answer.

Ollama hands a template `.System` and `.Messages`. What stands around each kind of turn is found by rendering the Jinja
template on marked texts, and what was found is put together again for other conversations and held against Jinja's own
render. A template that cannot be said this way is refused with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from toolkit.data.template import ChatTemplate, TemplateRefused
from toolkit.data.turns import Messages
from toolkit.errors import UserError

SYSTEM, USER, REPLY = "SYSTEMTEXT", "USERTEXT", "REPLYTEXT"
TURNS = [{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}]
WITH_SYSTEM = {"role": "system", "content": SYSTEM}


@dataclass(frozen=True)
class Pieces:
    """The text around turns. A conversation is `opening` (or, with a system text, that between the two of `system`),
    then each turn between its two, then `generation`. `system` is None where the template has no system turns."""

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    def render(self, messages: Messages) -> str:
        """What Ollama makes of the messages."""
        text = self.opening
        if messages[0]["role"] == "system" and self.system:
            text = self.system[0] + messages[0]["content"] + self.system[1]
        for message in messages:
            if message["role"] != "system":
                before, after = self.user if message["role"] == "user" else self.assistant
                text += before + message["content"] + after
        return text + self.generation

    def to_go(self) -> str:
        opening = _go(self.opening)
        if self.system:
            before, after = map(_go, self.system)
            otherwise = f"{{{{ else }}}}{opening}" if opening else ""
            opening = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}"
        user, assistant = (
            f"{_go(before)}{{{{ .Content }}}}{_go(after)}" for before, after in (self.user, self.assistant)
        )
        return (
            f'{opening}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{_go(self.generation)}'
        )


def pieces(template: ChatTemplate, adds_bos: bool) -> Pieces:
    """What stands around the turns of a template. Raises UserError with the reason when it does not come apart.

    `adds_bos`: the runtime puts the BOS token in front by itself, so the template must not.
    """

    def render(messages: Messages, generation: bool = False) -> str:
        text = template.render(messages, add_generation_prompt=generation)
        return text.removeprefix(template.bos_token) if adds_bos and template.bos_token else text

    try:
        before, between_1, between_2, *_ = _apart(render([*TURNS, *TURNS, TURNS[0]]))
        closed, ended = render(TURNS[:1]).partition(USER)[2], render(TURNS).partition(REPLY)[2]
        asked = render(TURNS[:1], generation=True).partition(USER)[2].rstrip(" ")
    except TemplateRefused as error:
        raise UserError(f"the chat template refuses turns of user and assistant: {error}") from None
    user_before = between_2.removeprefix(ended)
    if not (between_2.startswith(ended) and before.endswith(user_before)):
        user_before = _common(before[::-1], between_2[::-1])[::-1]
    if not (between_1.startswith(closed) and asked.startswith(closed)):
        closed = _common(between_1, asked)
    found = Pieces(
        opening=before.removesuffix(user_before),
        system=None,
        user=(user_before, closed),
        assistant=(between_1.removeprefix(closed), between_2.removesuffix(user_before)),
        generation=asked.removeprefix(closed),
    )
    found = Pieces(found.opening, _system(render, user_before), found.user, found.assistant, found.generation)
    _prove(found, render)
    return found


def write(template: ChatTemplate, adds_bos: bool, gguf: str, ends: Sequence[str]) -> str:
    """The text of a Modelfile that stands beside the file `gguf`. Raises UserError as `pieces` does."""
    found = pieces(template, adds_bos)
    go = found.to_go()
    if '"""' in go:
        raise UserError('the chat template writes """, which a Modelfile cannot hold')
    notes = ["# Made from the chat template that the model was trained with; spaces around a text are kept."]
    if found.system is None:
        notes.append("# The template has no system turns: a SYSTEM text would not be shown to the model.")
    if "strftime_now" in template.source:
        notes.append("# The template writes today's date; here it is the date of training's renders.")
    stops = [f'PARAMETER stop "{_quoted(end)}"' for end in dict.fromkeys(ends)]
    return "\n".join([*notes, f"FROM ./{gguf}", f'TEMPLATE """{go}"""', *stops]) + "\n"


def adds_bos(folder: Path) -> bool:
    """Whether the tokenizer in `folder` puts BOS in front by itself, as llama.cpp then does too."""
    bos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("bos_token")
    return (
        bos is not None and Tokenizer.from_file(str(folder / "tokenizer.json")).encode("x").tokens[0] == bos
    )


def _system(render, user_before: str) -> tuple[str, str] | None:  # type: ignore[no-untyped-def]
    try:
        text = render([WITH_SYSTEM, TURNS[0]])
    except TemplateRefused:
        return None
    before, _, rest = text.partition(SYSTEM)
    after = rest.partition(USER)[0]
    if not rest or not after.endswith(user_before):
        raise UserError(
            "the chat template puts the system text inside the user's turn, or drops it: Ollama's templates cannot say "
            "that; use --format gguf, whose file carries the chat template itself"
        )
    return before, after.removesuffix(user_before)


def _prove(found: Pieces, render) -> None:  # type: ignore[no-untyped-def]
    """Raises UserError when another conversation renders otherwise than Jinja renders it."""
    talk: Messages = []
    for number in range(1, 5):
        talk.append({"role": "user", "content": f"Question {number}: what is {{{{ this }}}}?"})
        for start in ([], [{"role": "system", "content": "Be brief.\nBe kind."}]) if found.system else ([],):
            messages: Messages = [*start, *talk]
            if found.render(messages) != render(messages, True).rstrip(" "):
                raise UserError(
                    f"the chat template renders a conversation of {len(messages)} turns in a way that Ollama's "
                    "templates cannot say; use --format gguf, whose file carries the chat template itself"
                )
        talk.append({"role": "assistant", "content": f"Answer {number}.\n\n- with a list"})


def _apart(text: str) -> list[str]:
    """The text before, between and after five turns of user and assistant."""
    parts = []
    for mark in (USER, REPLY, USER, REPLY, USER):
        before, found, text = text.partition(mark)
        if not found:
            raise UserError("the chat template drops or reorders turns: Ollama's templates cannot say that")
        parts.append(before)
    return [*parts, text]


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if length is None else length]


def _go(text: str) -> str:
    """Literal text in a Go template; its only special mark is the opening of an action."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
