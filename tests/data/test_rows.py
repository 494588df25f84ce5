import json

import pytest

from toolkit.data.json_stream import Repeated
from toolkit.data.rows import Labelled, Pair, Reason, recognise, to_labelled, to_messages, to_pair
from toolkit.data.schemas import SCHEMAS
from toolkit.errors import UserError


def say(*turns: str) -> list[dict[str, str]]:
    """say("u hello", "a hi") -> messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def sharegpt(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "human", "a": "gpt", "t": "observation"}
    return [{"from": roles[turn[0]], "value": turn[2:]} for turn in turns]


CHATML = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
TRANSCRIPT = "\n\nHuman: Hi\nthere\n\nAssistant: Yes?\n\nHuman: Go"
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
VALUES = [{"type": "text", "value": "Hel"}, {"type": "text", "value": "lo"}]
TURN = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}

CHAT_ROWS = [
    ("sharegpt", {"conversations": sharegpt("s S", "u Q", "a A")}, say("s S", "u Q", "a A")),
    ("sharegpt", {"conversations": sharegpt("u Q", "a A", "t 4", "a B")}, say("u Q", "a A", "t 4", "a B")),
    ("sharegpt", {"conversations": say("u Q", "a A"), "score": 5}, say("u Q", "a A")),
    ("sharegpt", {"conversations": sharegpt("u Q", "a A"), "system": "S"}, say("s S", "u Q", "a A")),
    ("sharegpt", {"conversations": sharegpt("s  ", "u Q", "a A")}, say("u Q", "a A")),
    ("messages", {"messages": say("u Q", "a  A \n")}, say("u Q", "a  A \n")),
    ("messages", {"messages": [{"role": "user", "content": PARTS}, *say("a A")]}, say("u Hello", "a A")),
    (
        "messages",
        {"messages": [{"role": "user", "content": "Q", "from": None, "value": None}, *say("a A")]},
        say("u Q", "a A"),
    ),
    ("messages", {"messages": [{"role": "user", "content": VALUES}, *say("a A")]}, say("u Hello", "a A")),
    (
        "messages",
        {"messages": [{**say("u Q")[0], "weight": 0}, {**say("a A")[0], "weight": 1}]},
        say("u Q", "a A"),
    ),
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": True}, say("u Q", "a A")),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, say("u Add.\n\n1, 2", "a 3")),
    ("alpaca", {"instruction": "Add.", "input": " ", "output": "3"}, say("u Add.", "a 3")),
    ("alpaca", {"instruction": "Add.", "input": None, "output": "3"}, say("u Add.", "a 3")),
    ("alpaca", {"instruction": "Add.", "output": "3", "system": "S"}, say("s S", "u Add.", "a 3")),
    ("instruction_response", {"instruction": "Q", "context": "C", "response": "A"}, say("u Q\n\nC", "a A")),
    ("prompt_completion", {"prompt": "Q", "completion": "A"}, say("u Q", "a A")),
    ("prompt_completion", {"prompt": say("s S", "u Q"), "completion": say("a A")}, say("s S", "u Q", "a A")),
    ("question_response", {"question": "Q", "response_j": "A", "response_k": "B"}, say("u Q", "a A")),
    ("chatml", {"text": CHATML + "<|im_start|>assistant\nYes?"}, say("s Be kind.", "u Hi", "a Yes?")),
    (
        "transcript",
        {"text": TRANSCRIPT + "\n\nAssistant: On."},
        say("u Hi\nthere", "a Yes?", "u Go", "a On."),
    ),
    # what is not used, and why
    ("sharegpt", {"conversations": [{"from": "narrator", "value": "Q"}]}, Reason.UNKNOWN_ROLE),
    ("sharegpt", {"conversations": [{"from": None, "value": "Q"}]}, Reason.UNKNOWN_ROLE),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, Reason.MISSING_CONTENT),
    ("sharegpt", {"conversations": [{"from": "human"}]}, Reason.MISSING_CONTENT),
    ("sharegpt", {"conversations": None}, Reason.MISSING_CONTENT),
    ("sharegpt", {}, Reason.MISSING_CONTENT),
    ("sharegpt", {"conversations": []}, Reason.NO_TURNS),
    ("sharegpt", {"conversations": ["Q", "A"]}, Reason.WRONG_TYPE),
    ("sharegpt", {"conversations": "Q"}, Reason.WRONG_TYPE),
    ("sharegpt", {"conversations": sharegpt("u Q", "a A", "u R", "u S", "a A")}, Reason.OUT_OF_ORDER),
    ("sharegpt", {"conversations": sharegpt("a A", "u Q", "a A")}, Reason.OUT_OF_ORDER),
    ("sharegpt", {"conversations": sharegpt("u Q", "s S", "a A")}, Reason.OUT_OF_ORDER),
    ("sharegpt", {"conversations": sharegpt("u Q", "a A", "u R")}, Reason.ENDS_ON_USER),
    ("sharegpt", {"conversations": sharegpt("u Q", "a A", "t 4")}, Reason.ENDS_ON_USER),
    ("sharegpt", {"conversations": sharegpt("u Q", "a  ", "u R", "a A")}, Reason.EMPTY_REPLY),
    ("sharegpt", {"conversations": sharegpt("u \n", "a A")}, Reason.EMPTY_PROMPT),
    ("messages", {"messages": [*say("u Q"), TURN]}, Reason.TOOL_CALL),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, Reason.WRONG_TYPE),
    ("alpaca", {"instruction": "Q", "output": True}, Reason.WRONG_TYPE),
    ("alpaca", {"instruction": "Q", "input": 3, "output": "A"}, Reason.WRONG_TYPE),
    ("alpaca", {"instruction": "Q", "output": ""}, Reason.EMPTY_REPLY),
    ("prompt_completion", {"prompt": "Q", "completion": None}, Reason.MISSING_CONTENT),
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": False}, Reason.LABELLED_BAD),
    ("alpaca", {"instruction": "Q", "output": "A", "kto_tag": False}, Reason.LABELLED_BAD),
    ("prompt_completion", Repeated({"prompt": "Q", "completion": "A"}), Reason.REPEATED_KEY),
    ("messages", {"messages": [*say("u Q"), {**say("a A")[0], "loss_weight": 0.0}]}, Reason.WEIGHTED_TURN),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "value": "x"}]}]},
        Reason.WRONG_TYPE,
    ),
    ("chatml", {"text": "Hi<|im_start|>user\nQ<|im_end|>"}, Reason.UNPARSABLE_MARKUP),
    ("chatml", {"text": "<|im_start|>user\nQ\n<|im_start|>assistant\nA"}, Reason.UNPARSABLE_MARKUP),
    ("chatml", {"text": "plain"}, Reason.UNPARSABLE_MARKUP),
    ("transcript", {"text": "plain"}, Reason.UNPARSABLE_MARKUP),
    ("transcript", {"text": TRANSCRIPT}, Reason.ENDS_ON_USER),
    ("transcript", {"text": TRANSCRIPT + "\n\nAssistant:"}, Reason.EMPTY_REPLY),
]

PAIR = Pair(say("u Q"), say("a yes, A"), say("a yes, B"))
LONG = Pair(say("s S", "u P", "a O", "u Q"), say("a A"), say("a B"))
REPLIES = {"chosen": "yes, A", "rejected": "yes, B"}
WHOLE = {"chosen": say("s S", "u P", "a O", "u Q", "a A"), "rejected": say("s S", "u P", "a O", "u Q", "a B")}
KIND = Pair(say("s Be kind.", "u Hi"), say("a A"), say("a B"))
GO = Pair(say("u Hi\nthere", "a Yes?", "u Go"), say("a A"), say("a B"))
OPENED = CHATML + "<|im_start|>assistant\n"

PAIR_ROWS = [
    ("prompt_chosen_rejected", {"prompt": "Q", **REPLIES}, PAIR),
    ("prompt_chosen_rejected", {"prompt": "Q", "chosen": say("a yes, A"), "rejected": say("a yes, B")}, PAIR),
    ("prompt_chosen_rejected", {"prompt": say("u Q"), **REPLIES}, PAIR),
    ("prompt_chosen_rejected", {"prompt": "only the first turn", "question": "same", **WHOLE}, LONG),
    (
        "prompt_chosen_rejected",
        {"prompt": "Q", "system": "S", **REPLIES},
        Pair(say("s S", "u Q"), say("a yes, A"), say("a yes, B")),
    ),
    ("chosen_rejected", WHOLE, LONG),
    ("chosen_messages", {f"{side}_messages": turns for side, turns in WHOLE.items()}, LONG),
    (
        "chosen_messages",
        {
            f"{side}_messages": [
                {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": reply}], "loss_weight": 1.0},
            ]
            for side, reply in REPLIES.items()
        },
        PAIR,
    ),
    ("conversations_chosen_rejected", {"conversations": sharegpt("u Q"), **REPLIES}, PAIR),
    (
        "conversations_chosen_rejected",
        {
            "conversations": sharegpt("s S", "u P", "a O", "u Q"),
            "chosen": sharegpt("a A")[0],
            "rejected": sharegpt("a B")[0],
        },
        LONG,
    ),
    ("question_response_pair", {"question": "Q", "response_j": "yes, A", "response_k": "yes, B"}, PAIR),
    ("instruction_chosen_rejected", {"instruction": "Q", "input": "", "output": "O", **REPLIES}, PAIR),
    ("chatml", {"prompt": OPENED, "chosen": "A<|im_end|>\n", "rejected": "B"}, KIND),
    ("chatml", {"prompt": CHATML, "chosen": "A<|im_end|>", "rejected": "B<|im_end|>"}, KIND),
    ("chatml", {"chosen": OPENED + "A<|im_end|>", "rejected": OPENED + "B<|im_end|>"}, KIND),
    (
        "transcript",
        {"chosen": TRANSCRIPT + "\n\nAssistant: A", "rejected": TRANSCRIPT + "\n\nAssistant: B"},
        GO,
    ),
    ("transcript", {"prompt": TRANSCRIPT + "\n\nAssistant:", "chosen": " A", "rejected": " B"}, GO),
    # what is not used, and why
    ("prompt_chosen_rejected", {"prompt": "Q", "chosen": "A", "rejected": " A\n"}, Reason.EQUAL_REPLIES),
    ("prompt_chosen_rejected", {"prompt": "Q", "chosen": "A", "rejected": ""}, Reason.EMPTY_REPLY),
    ("prompt_chosen_rejected", Repeated({"prompt": "Q", **REPLIES}), Reason.REPEATED_KEY),
    ("prompt_chosen_rejected", {"prompt": "Q", "chosen": True, "rejected": "B"}, Reason.WRONG_TYPE),
    ("prompt_chosen_rejected", {"prompt": None, **REPLIES}, Reason.MISSING_CONTENT),
    (
        "prompt_chosen_rejected",
        {"prompt": "Q", "chosen": say("u Q", "a O", "u R", "a A"), "rejected": say("u Q", "a B")},
        Reason.EARLIER_TURNS_DIFFER,
    ),
    (
        "chosen_rejected",
        {"chosen": say("u Q", "a A"), "rejected": say("u R", "a B")},
        Reason.EARLIER_TURNS_DIFFER,
    ),
    ("chosen_rejected", {"chosen": say("u Q", "a A"), "rejected": say("u Q")}, Reason.ENDS_ON_USER),
    (
        "conversations_chosen_rejected",
        {"conversations": sharegpt("u Q", "a A"), **REPLIES},
        Reason.OUT_OF_ORDER,
    ),
    ("question_response_pair", {"question": "Q", "response_j": "A"}, Reason.MISSING_CONTENT),
    ("chatml", {"prompt": "plain", "chosen": "A", "rejected": "B"}, Reason.UNPARSABLE_MARKUP),
]

GOOD, BAD = Labelled(say("u Q"), say("a A"), True), Labelled(say("u Q"), say("a A"), False)

LABELLED_ROWS = [
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": True}, GOOD),
    ("prompt_completion", {"prompt": say("u Q"), "completion": say("a A"), "label": False}, BAD),
    (
        "prompt_completion",
        {"prompt": say("s S", "u P", "a O", "u Q"), "completion": say("a A"), "label": 1},
        Labelled(say("s S", "u P", "a O", "u Q"), say("a A"), True),
    ),
    ("messages", {"messages": say("u Q", "a A"), "label": False}, BAD),  # LLaMA-Factory's kto_en_demo
    ("sharegpt", {"conversations": sharegpt("u Q", "a A"), "kto_tag": True}, GOOD),
    ("alpaca", {"instruction": "Q", "input": "", "output": "A", "kto_tag": False}, BAD),
    # what is not used, and why
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": "good"}, Reason.WRONG_TYPE),
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": 0.5}, Reason.WRONG_TYPE),
    ("prompt_completion", {"prompt": "Q", "completion": "A", "label": None}, Reason.MISSING_CONTENT),
    ("prompt_completion", {"prompt": "Q", "completion": " ", "label": True}, Reason.EMPTY_REPLY),
    ("messages", {"messages": say("u Q"), "label": True}, Reason.ENDS_ON_USER),
    ("messages", Repeated({"messages": say("u Q", "a A"), "label": True}), Reason.REPEATED_KEY),
]


@pytest.mark.parametrize(("schema", "row", "expected"), LABELLED_ROWS)
def test_to_labelled(schema, row, expected):
    assert to_labelled(row, schema) == expected


@pytest.mark.parametrize(("schema", "row", "expected"), LABELLED_ROWS)
def test_good_labelled_rows_are_recognised(schema, row, expected):
    if not isinstance(expected, Reason):
        assert recognise(row, "labelled", row) == schema


@pytest.mark.parametrize(("schema", "row", "expected"), CHAT_ROWS)
def test_to_messages(schema, row, expected):
    assert to_messages(row, schema) == expected


@pytest.mark.parametrize(("schema", "row", "expected"), PAIR_ROWS)
def test_to_pair(schema, row, expected):
    assert to_pair(row, schema) == expected


def test_every_schema_is_in_the_tables():
    assert {schema for schema, _, _ in CHAT_ROWS} == set(SCHEMAS["chat"])
    assert {schema for schema, _, _ in PAIR_ROWS} == set(SCHEMAS["pair"])
    assert {schema for schema, _, _ in LABELLED_ROWS} == set(SCHEMAS["labelled"])


@pytest.mark.parametrize(("schema", "row", "expected"), CHAT_ROWS)
def test_good_rows_are_recognised(schema, row, expected):
    if not isinstance(expected, Reason):
        assert recognise(row, "chat", row) == schema


@pytest.mark.parametrize(("schema", "row", "expected"), PAIR_ROWS)
def test_good_pairs_are_recognised(schema, row, expected):
    if not isinstance(expected, Reason):
        assert recognise(row, "pair", row) == schema


def test_system_turn_merged_into_the_first_user_turn():
    row = {"conversations": sharegpt("s  S ", "u Q", "a A")}
    assert to_messages(row, "sharegpt", system="merge") == say("u S\n\nQ", "a A")
    pair = to_pair({"prompt": "Q", "system": "S", **REPLIES}, "prompt_chosen_rejected", system="merge")
    assert pair == Pair(say("u S\n\nQ"), PAIR.chosen, PAIR.rejected)


def test_reading_leaves_the_row_alone():
    row = {"messages": say("s S", "u Q", "a A")}
    before = json.dumps(row)
    to_messages(row, "messages", system="merge")[0]["content"] = "changed"
    assert json.dumps(row) == before


REAL_COLUMNS = [
    ("labelled", "prompt completion label", {"label": True}, "prompt_completion"),  # trl-lib/kto-mix-14k
    ("labelled", "messages label", {"label": False}, "messages"),  # LLaMA-Factory's kto_en_demo
    ("pair", "source prompt question chosen rejected", WHOLE, "prompt_chosen_rejected"),  # orpo-dpo-mix-40k
    (
        "pair",
        "prompt prompt_id chosen rejected messages score_chosen score_rejected",
        WHOLE,
        "prompt_chosen_rejected",
    ),
    ("chat", "prompt prompt_id chosen rejected messages score_chosen score_rejected", WHOLE, "messages"),
    ("chat", "prompt prompt_id messages", {}, "messages"),  # ultrachat_200k
    ("chat", "conversations source score", {}, "sharegpt"),  # FineTome-100k
    ("chat", "instruction input output", {}, "alpaca"),
    ("chat", "instruction context response category", {}, "instruction_response"),  # dolly-15k
    ("chat", "qid question date metadata response_j response_k", {}, "question_response"),
    ("pair", "qid question date metadata response_j response_k", {}, "question_response_pair"),
    ("pair", "conversations chosen rejected", WHOLE, "conversations_chosen_rejected"),  # lf_dpo_en_demo
    ("pair", "instruction input output rejected chosen", REPLIES, "instruction_chosen_rejected"),  # rasbt
    ("pair", "prompt chosen rejected delta_score", {"prompt": OPENED, **REPLIES}, "chatml"),
    ("pair", "chosen rejected", {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "transcript"),  # hh-rlhf
    ("chat", "instruction input output chosen rejected", REPLIES, "alpaca"),
]


@pytest.mark.parametrize(("kind", "columns", "row", "expected"), REAL_COLUMNS)
def test_real_sets_are_recognised(kind, columns, row, expected):
    assert recognise(columns.split(), kind, row) == expected


@pytest.mark.parametrize(
    ("kind", "columns", "row", "words"),
    [
        ("chat", "conversations messages", {}, "more than one chat schema (sharegpt, messages)"),
        (
            "chat",
            "instruction output response",
            {},
            "more than one chat schema (alpaca, instruction_response)",
        ),
        ("pair", "prompt instruction chosen rejected", REPLIES, "more than one pair schema"),
        ("chat", "title body", {}, "The columns body, title fit no chat schema"),
        ("chat", "text", {"text": "plain prose"}, "no chat schema"),
        ("pair", "chosen rejected", REPLIES, "no pair schema"),
        ("labelled", "prompt completion", {}, "no labelled schema"),
        ("pair", "prompt chosen rejected", {"chosen": True}, "no pair schema"),
        ("chat", "", {}, "(none)"),
    ],
)
def test_never_guessed(kind, columns, row, words):
    with pytest.raises(UserError) as error:
        recognise(columns.split(), kind, row)
    assert words in str(error.value)
    assert "`schema:`" in str(error.value)
    assert all(name in str(error.value) for name in SCHEMAS[kind])


def test_unknown_schema_names_the_near_one():
    with pytest.raises(UserError, match="Did you mean sharegpt"):
        to_messages({}, "share_gpt")
    with pytest.raises(UserError, match="pair schema 'alpaca'"):
        to_pair({}, "alpaca")
