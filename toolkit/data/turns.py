"""One value of a row -> turns: text, lists of turns, ChatML markup, Human:/Assistant: transcripts. Pure.

Every function raises Unusable, with the reason, where the value is not what it should be.
"""

import re
from collections.abc import Mapping
from typing import Any

from toolkit.data.reasons import Reason, Unusable

Messages = list[dict[str, str]]  # {"role": system|user|assistant|tool, "content": text}

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
WEIGHTS = ("weight", "loss_weight")  # of a turn: OpenAI's and LLaMA-Factory's
START, END = "<|im_start|>", "<|im_end|>"
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_text(value: Any) -> str:
    """A string as it stands; a list of parts of type text joined without a separator.

    A part is {"type": "text", "text": ...} as OpenAI writes it, or with `value` as LLaMA-Factory does.
    """
    if isinstance(value, str):
        return value
    texts = [_text_of(part) for part in value] if isinstance(value, list) else []
    if texts and all(isinstance(text, str) for text in texts):
        return "".join(texts)
    raise Unusable(Reason.MISSING_CONTENT if value is None else Reason.WRONG_TYPE)


def _text_of(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in (None, "text"):
        return None
    return part.get("value") if part.get("text") is None else part["text"]


def read_turns(value: Any) -> Messages:
    """A turn, or a list of them, in either spelling: role and content, or from and value."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise Unusable(Reason.MISSING_CONTENT if value is None else Reason.WRONG_TYPE)
    return [_turn(turn) for turn in value]


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise Unusable(Reason.WRONG_TYPE)
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise Unusable(Reason.UNKNOWN_ROLE)
    if turn.get("tool_calls"):
        raise Unusable(Reason.TOOL_CALL)
    if ROLES[role] == "assistant" and any(turn.get(key) not in (None, 1) for key in WEIGHTS):
        raise Unusable(Reason.WEIGHTED_TURN)
    content = turn.get("content")
    return {"role": ROLES[role], "content": read_text(turn.get("value") if content is None else content)}


def read_said(role: str, value: Any) -> Messages:
    """A plain string is one turn of this role; turns are themselves."""
    return [{"role": role, "content": value}] if isinstance(value, str) else read_turns(value)


def read_chatml(text: str) -> Messages:
    """Text in ChatML markup -> turns. Only the last turn may lack its end mark."""
    before, *blocks = text.split(START)
    if before.strip() or not blocks:
        raise Unusable(Reason.UNPARSABLE_MARKUP)
    messages = []
    for i, block in enumerate(blocks):
        role, newline, body = block.partition("\n")
        content, end, after = body.partition(END)
        is_open = not end and i < len(blocks) - 1
        if not newline or is_open or after.strip():
            raise Unusable(Reason.UNPARSABLE_MARKUP)
        messages.append(_turn({"role": role.strip(), "content": content}))
    return messages


def read_transcript(text: str) -> Messages:
    """A transcript whose turns open with "Human:" or "Assistant:" after a blank line -> turns, trimmed."""
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise Unusable(Reason.UNPARSABLE_MARKUP)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in turns]


def is_text(text: str) -> bool:
    """Whether all of it are characters: JSON can hold half of one, a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shape_of(value: Any) -> str:
    """turns | chatml | transcript | plain, or "" for what is neither text nor turns."""
    if isinstance(value, str):
        return "chatml" if START in value else "transcript" if SPEAKER.match(value) else "plain"
    return "turns" if isinstance(value, (list, Mapping)) else ""
