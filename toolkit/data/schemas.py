"""The row layouts of public data sets: which columns make one, and how its rows are read into turns. Pure.

A reader gives whole conversations and leaves their order to `rows.py`; it raises Unusable where a value is
not what the schema says. To add a schema, add a line to SCHEMAS and a row to the table in tests/test_rows.py.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from toolkit.data.reasons import Reason, Unusable
from toolkit.data.turns import (
    END,
    SPEAKER,
    START,
    Messages,
    read_chatml,
    read_said,
    read_text,
    read_transcript,
    read_turns,
    shape_of,
)
from toolkit.errors import UserError
from toolkit.recipe.stages import RowKind

Row = Mapping[str, Any]
Conversations = tuple[Messages, Messages]  # chosen, rejected
LABELS = (
    "label",
    "kto_tag",
)  # of a set for KTO: whether the reply is a good one; TRL's name and LLaMA-Factory's


class Schema(NamedTuple):
    """A row layout: the columns it must have, how to read a row, and what the first row must look like."""

    columns: frozenset[str]
    read: Callable[[Row], Any]  # chat, labelled and prompt: Messages; pair: Conversations
    fits: Callable[[Row], bool]


def schema_of(name: str, kind: RowKind) -> Schema:
    """The schema of that name; UserError, with the near name, where there is none."""
    try:
        return SCHEMAS[kind][name]
    except KeyError:
        near = difflib.get_close_matches(name, SCHEMAS[kind], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"No {kind} schema {name!r}. {hint}Allowed: {', '.join(SCHEMAS[kind])}.") from None


def recognise(columns: Iterable[str], kind: RowKind, row: Row) -> str:
    """The name of the one schema of this kind that the columns fit.

    `row` is the first one whose columns are filled: where names alone do not decide, its values tell plain
    strings, turns, ChatML and transcripts apart. A schema that asks for more of the columns wins over one
    that asks for fewer of the same. Raises UserError, showing columns and schemas, where none or several fit.
    """
    got, schemas = set(columns), SCHEMAS[kind]
    fitting = [name for name, schema in schemas.items() if schema.columns <= got and schema.fits(row)]
    names = [
        name
        for name in fitting
        if not any(schemas[name].columns < schemas[other].columns for other in fitting)
    ]
    if len(names) == 1:
        return names[0]
    found = f"fit more than one {kind} schema ({', '.join(names)})" if names else f"fit no {kind} schema"
    known = "; ".join(f"{name}: {' + '.join(sorted(schema.columns))}" for name, schema in schemas.items())
    raise UserError(
        f"The columns {', '.join(sorted(got)) or '(none)'} {found}. "
        f"Name one with `schema:`, or rename the columns. Known: {known}."
    )


# Readers ---------------------------------------------------------------------------------------------------


def _with_system(row: Row, messages: Messages) -> Messages:
    """A filled `system` column is the system turn, unless the conversation brings its own."""
    system = row.get("system")
    if system is None or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": read_text(system)}, *messages]


def _instruction(row: Row) -> str:
    """Instruction and, after a blank line, what it is about: `input`, or Dolly's `context`."""
    instruction = read_text(row.get("instruction"))
    given = row.get("context") if row.get("input") is None else row["input"]
    about = "" if given is None else read_text(given)
    return f"{instruction}\n\n{about}" if about.strip() else instruction


def _conversation(column: str) -> Callable[[Row], Messages]:
    return lambda row: _with_system(row, read_turns(row.get(column)))


def _user(text: Callable[[Row], Any]) -> Callable[[Row], Messages]:
    """One user turn from plain text; where the value already is turns, those."""
    return lambda row: read_said("user", text(row))


def _exchange(prompt: Callable[[Row], Messages], reply: str) -> Callable[[Row], Messages]:
    """The prompt's turns and then the column `reply`: text, or turns."""
    return lambda row: _with_system(row, prompt(row) + read_said("assistant", row.get(reply)))


def _pair(prompt: Callable[[Row], Messages], chosen: str, rejected: str) -> Callable[[Row], Conversations]:
    """A reply that opens with a prompt of its own is a whole conversation, any other follows `prompt`."""

    def conversation(row: Row, column: str) -> Messages:
        reply = read_said("assistant", row.get(column))
        is_whole = bool(reply) and reply[0]["role"] in ("system", "user")
        return _with_system(row, reply if is_whole else prompt(row) + reply)

    return lambda row: (conversation(row, chosen), conversation(row, rejected))


def read_label(row: Row) -> bool:
    """Whether a labelled row holds a good reply: true or false, as JSON or as 1 and 0."""
    found = [row[name] for name in LABELS if row.get(name) is not None]
    if not found:
        raise Unusable(Reason.MISSING_CONTENT)
    if found[0] not in (True, False):
        raise Unusable(Reason.WRONG_TYPE)
    return bool(found[0])


def _marked(read: Callable[[str], Messages]) -> Callable[[Row], Messages]:
    return lambda row: read(read_text(row.get("text")))


def _chatml_pair(row: Row) -> Conversations:
    def conversation(column: str) -> Messages:
        reply = read_text(row.get(column))
        if reply.lstrip().startswith(START):
            return read_chatml(reply)
        prompt = read_text(row.get("prompt"))
        opens = f"\n{START}assistant\n" if prompt.rstrip().endswith(END) else ""
        return read_chatml(prompt + opens + reply)

    return conversation("chosen"), conversation("rejected")


def _transcript_pair(row: Row) -> Conversations:
    def conversation(column: str) -> Messages:
        reply = read_text(row.get(column))
        return read_transcript(reply if SPEAKER.match(reply) else read_text(row.get("prompt")) + reply)

    return conversation("chosen"), conversation("rejected")


# The tables ------------------------------------------------------------------------------------------------


def _replies_are(*shapes: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        reply, prompt = shape_of(row.get("chosen")), shape_of(row.get("prompt"))
        return (prompt if reply == "plain" and prompt in ("chatml", "transcript") else reply) in shapes

    return fits


def _is_labelled(row: Row) -> bool:
    return any(row.get(name) is not None for name in LABELS)


def _text_is(shape: str) -> Callable[[Row], bool]:
    return lambda row: shape_of(row.get("text")) == shape


def _any(row: Row) -> bool:
    return True


def _columns(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _only_asks(row: Row) -> bool:
    """A row that brings replies is of one of the schemas that read them."""
    return not any(row.get(column) is not None for column in ("chosen", "rejected", "chosen_messages"))


def _chosen(pair: Callable[[Row], Conversations]) -> Callable[[Row], Messages]:
    """One conversation of a pair: what comes before its last reply is the same in both."""
    return lambda row: pair(row)[0]


_asked = _user(_instruction)
_prompted = _user(lambda row: row.get("prompt"))
_question = _user(lambda row: row.get("question"))
_context = _user(lambda row: row.get("conversations"))
_in_words = _replies_are("turns", "plain")

SCHEMAS: dict[RowKind, dict[str, Schema]] = {
    "chat": {
        "sharegpt": Schema(_columns("conversations"), _conversation("conversations"), _any),
        "messages": Schema(_columns("messages"), _conversation("messages"), _any),
        "alpaca": Schema(_columns("instruction output"), _exchange(_asked, "output"), _any),
        "instruction_response": Schema(_columns("instruction response"), _exchange(_asked, "response"), _any),
        "prompt_completion": Schema(_columns("prompt completion"), _exchange(_prompted, "completion"), _any),
        "question_response": Schema(
            _columns("question response_j"), _exchange(_question, "response_j"), _any
        ),
        "chatml": Schema(_columns("text"), _marked(read_chatml), _text_is("chatml")),
        "transcript": Schema(_columns("text"), _marked(read_transcript), _text_is("transcript")),
    },
    "pair": {
        "prompt_chosen_rejected": Schema(
            _columns("prompt chosen rejected"), _pair(_prompted, "chosen", "rejected"), _in_words
        ),
        "chosen_rejected": Schema(
            _columns("chosen rejected"), _pair(lambda row: [], "chosen", "rejected"), _replies_are("turns")
        ),
        "chosen_messages": Schema(
            _columns("chosen_messages rejected_messages"),
            _pair(lambda row: [], "chosen_messages", "rejected_messages"),
            _any,
        ),
        "conversations_chosen_rejected": Schema(
            _columns("conversations chosen rejected"), _pair(_context, "chosen", "rejected"), _in_words
        ),
        "instruction_chosen_rejected": Schema(
            _columns("instruction chosen rejected"), _pair(_asked, "chosen", "rejected"), _in_words
        ),
        "question_response_pair": Schema(
            _columns("question response_j response_k"), _pair(_question, "response_j", "response_k"), _any
        ),
        "chatml": Schema(_columns("chosen rejected"), _chatml_pair, _replies_are("chatml")),
        "transcript": Schema(_columns("chosen rejected"), _transcript_pair, _replies_are("transcript")),
    },
    "labelled": {
        "prompt_completion": Schema(
            _columns("prompt completion"), _exchange(_prompted, "completion"), _is_labelled
        ),
        "messages": Schema(_columns("messages"), _conversation("messages"), _is_labelled),
        "sharegpt": Schema(_columns("conversations"), _conversation("conversations"), _is_labelled),
        "alpaca": Schema(_columns("instruction output"), _exchange(_asked, "output"), _is_labelled),
    },
}
SCHEMAS["prompt"] = {
    "messages": Schema(_columns("messages"), _conversation("messages"), _only_asks),
    "conversations": Schema(_columns("conversations"), _conversation("conversations"), _only_asks),
    "prompt": Schema(_columns("prompt"), lambda row: _with_system(row, _prompted(row)), _only_asks),
    "question": Schema(_columns("question"), lambda row: _with_system(row, _question(row)), _only_asks),
    "instruction": Schema(_columns("instruction"), lambda row: _with_system(row, _asked(row)), _only_asks),
    **{
        name: schema._replace(read=_chosen(schema.read))
        for name, schema in SCHEMAS["pair"].items()
        if name in ("prompt_chosen_rejected", "chosen_rejected", "chosen_messages")
    },
}

# What only asks. A row of any schema above holds one of these columns too; the first that is filled is read.
PROMPTS: dict[str, Callable[[Row], Messages]] = {
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "prompt": lambda row: _with_system(row, _prompted(row)),
    "instruction": lambda row: _with_system(row, _asked(row)),
    "question": lambda row: _with_system(row, _question(row)),
    "chosen": lambda row: read_said("assistant", row["chosen"]),
    "chosen_messages": lambda row: read_said("assistant", row["chosen_messages"]),
}
