"""A dataset row of a known schema -> messages, a preference pair or a labelled reply, or the reason why not. Pure.

Pairs are split on turns, never on common characters: a first word that both replies share belongs to them.
"""

from collections.abc import Callable
from types import NoneType
from typing import Literal, NamedTuple

from toolkit.data.json_stream import Repeated
from toolkit.data.reasons import Reason, Unusable
from toolkit.data.schemas import LABELS, PROMPTS, Row, read_label, recognise, schema_of
from toolkit.data.turns import Messages
from toolkit.recipe.stages import RowKind

__all__ = [
    "Item",
    "Labelled",
    "Messages",
    "Pair",
    "Question",
    "Reason",
    "Row",
    "SystemTurns",
    "recognise",
    "to_item",
    "to_labelled",
    "to_messages",
    "to_pair",
    "to_prompt",
    "to_question",
]

SystemTurns = Literal["keep", "merge"]


class Pair(NamedTuple):
    """`prompt` is every shared earlier turn, `chosen` and `rejected` are one assistant message each."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


class Question(NamedTuple):
    """`prompt` is what a model is asked, up to where its answer begins; `answers` are those that count as right."""

    prompt: Messages
    answers: list[str]


class Labelled(NamedTuple):
    """`completion` is the last assistant message of a conversation, `label` whether it is a good one."""

    prompt: Messages
    completion: Messages
    label: bool


Item = Messages | Pair | Labelled | Question | Reason


def to_messages(row: Row, schema: str, system: SystemTurns = "keep") -> Messages | Reason:
    """A row of a chat schema -> messages that end on the assistant, or the reason why not.

    `system="merge"` writes a system turn into the first user turn. Text is kept as it stands; only a blank
    system turn is left out. Raises UserError for a schema that does not exist.
    """
    read = schema_of(schema, "chat").read
    if isinstance(row, Repeated):
        return Reason.REPEATED_KEY
    if any(
        row.get(name) is False for name in LABELS
    ):  # a set for KTO: its replies are good ones and bad ones
        return Reason.LABELLED_BAD
    try:
        return _in_order(read(row), system)
    except Unusable as unusable:
        return unusable.reason


def to_pair(row: Row, schema: str, system: SystemTurns = "keep") -> Pair | Reason:
    """A row of a pair schema -> a Pair, or the reason why not. `system` and errors as in `to_messages`."""
    read = schema_of(schema, "pair").read
    if isinstance(row, Repeated):
        return Reason.REPEATED_KEY
    try:
        chosen, rejected = (_in_order(conversation, system) for conversation in read(row))
    except Unusable as unusable:
        return unusable.reason
    if not _same(chosen[:-1], rejected[:-1]):
        return Reason.EARLIER_TURNS_DIFFER
    if _same(chosen[-1:], rejected[-1:]):
        return Reason.EQUAL_REPLIES
    return Pair(chosen[:-1], chosen[-1:], rejected[-1:])


def to_question(row: Row, schema: str, system: SystemTurns = "keep") -> Question | Reason:
    """A row of a prompt schema -> a Question, or the reason why not. `system` and errors as in `to_messages`."""
    read = schema_of(schema, "prompt").read
    if isinstance(row, Repeated):
        return Reason.REPEATED_KEY
    try:
        return Question(_asking(read(row), system), _answers(row))
    except Unusable as unusable:
        return unusable.reason


def to_labelled(row: Row, schema: str, system: SystemTurns = "keep") -> Labelled | Reason:
    """A row of a labelled schema -> its reply and its label, or the reason why not; as `to_messages`."""
    read = schema_of(schema, "labelled").read
    if isinstance(row, Repeated):
        return Reason.REPEATED_KEY
    try:
        messages = _in_order(read(row), system)
        return Labelled(messages[:-1], messages[-1:], read_label(row))
    except Unusable as unusable:
        return unusable.reason


_READERS: dict[RowKind, Callable[[Row, str, SystemTurns], Item]] = {
    "chat": to_messages,
    "pair": to_pair,
    "labelled": to_labelled,
    "prompt": to_question,
}


def to_item(row: Row, kind: RowKind, schema: str, system: SystemTurns = "keep") -> Item:
    """A row of this kind -> what it holds; as `to_messages`, `to_pair`, `to_labelled` and `to_question`."""
    return _READERS[kind](row, schema, system)


def to_prompt(row: Row, system: SystemTurns = "keep") -> Messages | Reason:
    """What a row of any layout asks: its turns up to the last one that a model is to answer, or the reason why not.

    Replies after it are left out. `system` as in `to_messages`.
    """
    if isinstance(row, Repeated):
        return Reason.REPEATED_KEY
    filled = [read for column, read in PROMPTS.items() if row.get(column) is not None]
    if not filled:
        return Reason.MISSING_CONTENT
    try:
        return _asking(filled[0](row), system)
    except Unusable as unusable:
        return unusable.reason


def _asking(messages: Messages, system: SystemTurns) -> Messages:
    """The turns up to the last one that a model is to answer."""
    asking = [at for at, message in enumerate(messages) if message["role"] in ("user", "tool")]
    return _in_order(messages[: asking[-1] + 1 if asking else 0], system, ends_on=("user", "tool"))


def _answers(row: Row) -> list[str]:
    """What the columns `answers` or `answer` hold: a text, a number, or a list of such; [] where there is none."""
    given = row.get("answer") if row.get("answers") is None else row["answers"]
    several = given if isinstance(given, list) else [given]
    if not all(isinstance(one, (str, int, float, NoneType)) and not isinstance(one, bool) for one in several):
        raise Unusable(Reason.WRONG_TYPE)
    return [text for one in several if one is not None and (text := str(one).strip())]


_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _in_order(messages: Messages, system: SystemTurns, ends_on: tuple[str, ...] = ("assistant",)) -> Messages:
    """The same messages once their order is lawful, no turn is empty and the last one is a reply, or `ends_on`."""
    if not messages:
        raise Unusable(Reason.NO_TURNS)
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    before = ""
    for message in messages:
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise Unusable(Reason.OUT_OF_ORDER)
        if not message["content"].strip() and role in ("user", "assistant"):
            raise Unusable(Reason.EMPTY_PROMPT if role == "user" else Reason.EMPTY_REPLY)
        before = role
    if before not in ends_on:
        raise Unusable(Reason.ENDS_ON_USER)
    if messages[0]["role"] != "system" or system == "keep":
        return messages
    merged = messages[0]["content"].strip() + "\n\n" + messages[1]["content"]
    return [{"role": "user", "content": merged}, *messages[2:]]


def _same(left: Messages, right: Messages) -> bool:
    """Equal up to the white space around each text, which templates trim."""
    if left == right:
        return True
    return len(left) == len(right) and all(
        a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
        for a, b in zip(left, right, strict=True)
    )
