"""Why a row of a data set is not used: each way to lose one has a name here."""

import enum


class Reason(enum.StrEnum):
    """The value is the key in data_report.json; `sentence` says it to a person."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> "Reason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    # the row itself (schemas.py, rows.py)
    MISSING_CONTENT = "missing_content", "a column, or the text of a turn, is missing"
    REPEATED_KEY = (
        "repeated_key",
        "an object of the row names a key twice, and one of its values would be lost",
    )
    WRONG_TYPE = "wrong_type", "something else stands where text or a list of turns belongs"
    NO_TURNS = "no_turns", "the conversation has no turn"
    UNKNOWN_ROLE = (
        "unknown_role",
        "a turn has a role that is none of system, user, assistant, tool or an alias",
    )
    TOOL_CALL = "tool_call", "a turn calls a tool in a field of its own, which would be lost"
    WEIGHTED_TURN = "weighted_turn", "a reply has a weight other than 1, and all replies are trained alike"
    LABELLED_BAD = "labelled_bad", "its label is false: a reply that the set calls bad would be trained"
    OUT_OF_ORDER = "turns_out_of_order", "the turns do not alternate between user and assistant"
    ENDS_ON_USER = "ends_on_user", "the last turn is not a reply of the assistant"
    EMPTY_PROMPT = "empty_prompt", "a user turn is empty"
    EMPTY_REPLY = "empty_reply", "a reply of the assistant is empty"
    UNPARSABLE_MARKUP = "unparsable_markup", "the ChatML or Human:/Assistant: text does not split into turns"
    EQUAL_REPLIES = "chosen_equals_rejected", "chosen and rejected are the same"
    EARLIER_TURNS_DIFFER = "earlier_turns_differ", "chosen and rejected differ before their last turn"
    # the row under a template and a tokenizer (masking.py)
    BROKEN_TEXT = "broken_text", "the text holds half a character (a lone surrogate)"
    SPECIAL_TOKEN_IN_TEXT = (
        "special_token_in_text",
        "a turn contains, as text, a special token of the tokenizer or template",
    )
    TEMPLATE_REFUSED = "template_refused", "the chat template refused the conversation"
    TEMPLATE_UNSTABLE = "template_unstable", "the template writes earlier turns differently once more follow"
    NO_END_OF_TURN = "no_end_of_turn", "the template does not close a reply with the end-of-turn token"
    # the row within max_length (masking.py)
    TOO_MANY_REPLIES = "too_many_replies", "more than 1,000 replies begin within max_length"
    NO_ROOM = "prompt_leaves_no_room", "the prompt alone fills max_length"
    EQUAL_AFTER_CUT = "equal_after_cutting", "chosen and rejected are the same once cut at max_length"
    ANSWER_CUT = "answer_cut", "an answer does not end within max_length and the recipe drops such rows"
    NO_TRAINED_TOKEN = "no_trained_token", "no trained token is left within max_length"


REASONS = {reason.value: reason for reason in Reason}


class Unusable(Exception):
    """Carries a Reason out of the reading of a row; `rows.py` turns it back into a value."""

    def __init__(self, reason: Reason):
        super().__init__(reason.sentence)
        self.reason = reason
