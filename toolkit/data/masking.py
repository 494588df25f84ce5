"""Messages -> token ids and labels: what is trained, what is masked, what was cut. Pure; needs no model.

A reply starts where the render of what comes before it, with the generation prompt, ends; that render must be
a prefix of the whole one. It ends with the end-of-turn token. Every token that overlaps a reply is trained.
Spaces at the end of the generation prompt belong to the reply, because tokenizers glue them to its first
word; `generation_prompt` leaves them out, so that inference sees what training saw.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from tokenizers import Encoding, Tokenizer

from toolkit.data.reasons import Reason, Unusable
from toolkit.data.rows import Labelled, Pair, Question
from toolkit.data.template import ChatTemplate, TemplateRefused
from toolkit.data.turns import Messages
from toolkit.errors import UserError
from toolkit.recipe.stages import RowKind

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy ignores

FEW_REPLIES = 64  # up to so many are all looked at
# Of one row, within max_length. Each costs a render of all before it: two seconds of work in all.
MOST_REPLIES = 1000

Span = tuple[int, int]  # [start, end)


class TokenizedChat(NamedTuple):
    """One conversation; `labels`, of the same length, equals `input_ids` where trained, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # an answer lost its end, and with it its end-of-turn token

    @property
    def num_trained(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class TokenizedPair(NamedTuple):
    """One pair: the sequences prompt_ids + chosen_ids and prompt_ids + rejected_ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    cut: bool  # at least one of the answers lost its end


class TokenizedPrompt(NamedTuple):
    """What a model is asked: its ids up to where the answer begins, and as JSON the turns and the right answers."""

    prompt_ids: list[int]
    prompt: str
    answers: str

    @property
    def cut(self) -> bool:
        """Never: a part of a question is another question."""
        return False


class TokenizedLabelled(NamedTuple):
    """One labelled reply: the sequence prompt_ids + completion_ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    cut: bool  # the reply lost its end


Tokenized = TokenizedChat | TokenizedPair | TokenizedLabelled | TokenizedPrompt


def generation_prompt(template: ChatTemplate, messages: Messages) -> str:
    """The text that a model continues with its reply, as training saw it. Raises TemplateRefused."""
    return template.render(messages, add_generation_prompt=True).rstrip(" ")


def special_tokens(tokenizer: Tokenizer, template: ChatTemplate, end_of_turn: str) -> re.Pattern[str]:
    """Finds what no turn may hold as text, because it would become a token that is more than text.

    These are the tokens that the tokenizer calls special, BOS, EOS and the end of turn, those that the template
    writes, and its markers: ChatML in ordinary text is made of none of the tokenizer's own. Added tokens that the
    tokenizer does not call special are its way to write text (Gemma's newlines and tags, Qwen's <think>).
    """
    added = tokenizer.get_added_tokens_decoder().values()
    tokens = {end_of_turn, template.bos_token, template.eos_token}
    tokens.update(token.content for token in added if token.special)
    tokens.update(template.special_tokens([token.content for token in added]))
    tokens.update(template.markers())
    return re.compile("|".join(re.escape(token) for token in sorted(filter(None, tokens))))


@dataclass(frozen=True)
class Masking:
    """How conversations become tokens in one stage.

    `tokenizer` is the Rust one (`backend_tokenizer` in transformers); its truncation, padding and
    post-processor are set aside while it encodes. `end_of_turn` closes each reply and must be one token.
    Sequences longer than `max_length` tokens lose their end; a row whose answer that shortens is dropped when
    `overlong` is "drop".

    Raises UserError when `end_of_turn` is not one token of the tokenizer.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    end_of_turn: str
    max_length: int
    overlong: Literal["cut", "drop"] = "cut"

    def __post_init__(self) -> None:
        [encoding] = self._encode([self.end_of_turn])
        if len(encoding) != 1:
            raise UserError(
                f"end_of_turn {self.end_of_turn!r} is {len(encoding)} tokens in this tokenizer: a model "
                f"could not stop on it. Name a single token that the chat template writes after each reply."
            )

    def chats(self, rows: Sequence[Messages | Reason]) -> list[TokenizedChat | Reason]:
        """Conversations -> ids and labels, in the order of `rows`; a Reason stays what it is.

        All texts go through the tokenizer in one batch, so hand over hundreds of rows rather than one.
        """
        rendered = [row if isinstance(row, Reason) else self._replies(row) for row in rows]
        encodings = iter(self._encode([item[0] for item in rendered if not isinstance(item, Reason)]))
        return [
            item if isinstance(item, Reason) else self._chat(next(encodings), item[1]) for item in rendered
        ]

    def pairs(self, rows: Sequence[Pair | Reason]) -> list[TokenizedPair | Reason]:
        """Preference pairs -> ids of prompt, chosen and rejected, in the order of `rows`; as `chats`."""
        rendered = [row if isinstance(row, Reason) else self._both_replies(row) for row in rows]
        texts = [text for item in rendered if not isinstance(item, Reason) for text, _ in item]
        encodings = iter(self._encode(texts))
        return [
            item
            if isinstance(item, Reason)
            else self._pair((next(encodings), item[0][1]), (next(encodings), item[1][1]))
            for item in rendered
        ]

    def prompts(self, rows: Sequence[Question | Reason]) -> list[TokenizedPrompt | Reason]:
        """Questions -> their ids, in the order of `rows`; one of more than `max_length` tokens leaves no room."""
        texts = [row if isinstance(row, Reason) else self._asked(row.prompt) for row in rows]
        encodings = iter(self._encode([text for text in texts if not isinstance(text, Reason)]))
        found: list[TokenizedPrompt | Reason] = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(row, Reason) or isinstance(text, Reason):
                found.append(row if isinstance(row, Reason) else text)  # type: ignore[arg-type]
                continue
            ids = next(encodings).ids
            told = (json.dumps(value, ensure_ascii=False) for value in row)
            found.append(Reason.NO_ROOM if len(ids) > self.max_length else TokenizedPrompt(ids, *told))
        return found

    def labelled(self, rows: Sequence[Labelled | Reason]) -> list[TokenizedLabelled | Reason]:
        """Labelled replies -> ids of prompt and completion, in the order of `rows`; as `chats`."""
        rendered = [row if isinstance(row, Reason) else self._last_reply(row) for row in rows]
        encodings = iter(self._encode([item[0] for item in rendered if not isinstance(item, Reason)]))
        return [
            item if isinstance(item, Reason) else self._labelled(next(encodings), *item[1:])
            for item in rendered
        ]

    def tokenize(self, kind: RowKind, items: Sequence[Any]) -> Sequence[Tokenized | Reason]:
        """`chats`, `pairs`, `labelled` or `prompts`, whichever the rows are."""
        by_kind: dict[RowKind, Any] = {
            "chat": self.chats,
            "pair": self.pairs,
            "labelled": self.labelled,
            "prompt": self.prompts,
        }
        found: Sequence[Tokenized | Reason] = by_kind[kind](items)
        return found

    # Text --------------------------------------------------------------------------------------------------

    def _replies(self, messages: Messages, only_last: bool = False) -> tuple[str, list[Span]] | Reason:
        """The whole render and the character span of each reply (of the last one alone, for a pair)."""
        if any(self._structural.search(message["content"]) for message in messages):
            return Reason.SPECIAL_TOKEN_IN_TEXT
        try:
            whole = self.template.render(messages)
            whole.encode()
            replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if only_last or len(replies) <= FEW_REPLIES:
                return whole, [self._reply(whole, messages, i) for i in replies[-1 if only_last else 0 :]]
            return whole, self._replies_that_fit(whole, messages, replies)
        except TemplateRefused:
            return Reason.TEMPLATE_REFUSED
        except UnicodeEncodeError:
            return Reason.BROKEN_TEXT
        except Unusable as unusable:
            return unusable.reason

    def _asked(self, messages: Messages) -> str | Reason:
        if any(self._structural.search(message["content"]) for message in messages):
            return Reason.SPECIAL_TOKEN_IN_TEXT
        try:
            text = generation_prompt(self.template, messages)
            text.encode()
        except TemplateRefused:
            return Reason.TEMPLATE_REFUSED
        except UnicodeEncodeError:
            return Reason.BROKEN_TEXT
        return text

    def _replies_that_fit(self, whole: str, messages: Messages, replies: list[int]) -> list[Span]:
        """The spans of replies that begin within `max_length` tokens, and of the last one, which tells of a cut.

        Raises Unusable where they are more than MOST_REPLIES: a template may write a turn otherwise for whatever
        follows it, so each needs a render of its own.
        """
        [encoding] = self._encode([whole])
        end = encoding.offsets[self.max_length][0] if len(encoding) > self.max_length else len(whole)
        spans = []
        for i in replies[:-1]:
            spans.append(self._reply(whole, messages, i))
            if spans[-1][0] > end:
                break
            if len(spans) == MOST_REPLIES:
                raise Unusable(Reason.TOO_MANY_REPLIES)
        return [*spans, self._reply(whole, messages, replies[-1])]

    def _reply(self, whole: str, messages: Messages, i: int) -> Span:
        """Characters of reply i in the whole render, up to and with its end-of-turn token."""
        before = self.template.render(messages[:i], add_generation_prompt=True)
        if not whole.startswith(before):
            raise Unusable(Reason.TEMPLATE_UNSTABLE)
        start = len(before.rstrip(" "))
        as_expected = messages[i]["content"].strip() + self.end_of_turn
        text = next((at for at in range(start, len(whole)) if whole[at] != " "), len(whole))
        if whole.startswith(as_expected, text):  # nearly always; saves a render for each reply
            return start, text + len(as_expected)
        upto = self.template.render(messages[: i + 1])
        if not whole.startswith(upto):
            raise Unusable(Reason.TEMPLATE_UNSTABLE)
        end = upto.rfind(self.end_of_turn, len(before))
        if end < 0:
            raise Unusable(Reason.NO_END_OF_TURN)
        return start, end + len(self.end_of_turn)

    def _both_replies(self, pair: Pair) -> list[tuple[str, Span]] | Reason:
        both = []
        for reply in (pair.chosen, pair.rejected):
            replies = self._replies(pair.prompt + reply, only_last=True)
            if isinstance(replies, Reason):
                return replies
            both.append((replies[0], replies[1][0]))
        return both

    def _last_reply(self, row: Labelled) -> tuple[str, Span, bool] | Reason:
        replies = self._replies(row.prompt + row.completion, only_last=True)
        return replies if isinstance(replies, Reason) else (replies[0], replies[1][0], row.label)

    @cached_property
    def _structural(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer, self.template, self.end_of_turn)

    # Tokens ------------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str]) -> list[Encoding]:
        if not texts:
            return []
        with _bare(self.tokenizer):
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def _chat(self, encoding: Encoding, spans: list[Span]) -> TokenizedChat | Reason:
        ids: list[int] = encoding.ids
        labels = [IGNORE_INDEX] * len(ids)
        end = 0
        for span in spans:
            start, end = _tokens(encoding, span)
            labels[start:end] = ids[start:end]
        cut = end > self.max_length
        if cut and self.overlong == "drop":
            return Reason.ANSWER_CUT
        chat = TokenizedChat(ids[: self.max_length], labels[: self.max_length], cut)
        return chat if chat.num_trained else Reason.NO_TRAINED_TOKEN

    def _pair(self, chosen: tuple[Encoding, Span], rejected: tuple[Encoding, Span]) -> TokenizedPair | Reason:
        starts, both = [], []
        for encoding, span in (chosen, rejected):
            start, end = _tokens(encoding, span)
            starts.append(start)
            both.append(encoding.ids[:end])
        num_prompt = min(starts)
        while both[0][:num_prompt] != both[1][:num_prompt]:  # a reply can change the tokens just before it
            num_prompt -= 1
        if num_prompt >= self.max_length:
            return Reason.NO_ROOM
        if both[0] == both[1]:
            return Reason.EQUAL_REPLIES
        ids = [whole[: self.max_length] for whole in both]
        cut = ids != both
        if cut and self.overlong == "drop":
            return Reason.ANSWER_CUT
        if ids[0] == ids[1]:
            return Reason.EQUAL_AFTER_CUT
        return TokenizedPair(ids[0][:num_prompt], ids[0][num_prompt:], ids[1][num_prompt:], cut)

    def _labelled(self, encoding: Encoding, span: Span, label: bool) -> TokenizedLabelled | Reason:
        start, end = _tokens(encoding, span)
        if start >= self.max_length:
            return Reason.NO_ROOM
        cut = end > self.max_length
        if cut and self.overlong == "drop":
            return Reason.ANSWER_CUT
        ids = encoding.ids[: min(end, self.max_length)]
        return TokenizedLabelled(ids[:start], ids[start:], label, cut)


def _tokens(encoding: Encoding, span: Span) -> Span:
    """The tokens that overlap the characters of a span whose last token is an end-of-turn token."""
    start, end = span
    by_char = (encoding.char_to_token(char) for char in range(start, end))  # None where a normalizer ate it
    first = next(token for token in by_char if token is not None)
    last = encoding.char_to_token(end - 1)
    assert last is not None, "the end-of-turn token has no characters"
    return first, last + 1


@contextmanager
def _bare(tokenizer: Tokenizer) -> Iterator[None]:
    """Without truncation and padding, which transformers leaves switched on, and without a post-processor.

    The byte-level one trims spaces off the offsets, so that a token of nothing else would belong to no reply.
    """
    truncation, padding = tokenizer.truncation, tokenizer.padding
    post_processor, as_text = tokenizer.post_processor, tokenizer.encode_special_tokens
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = False
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = as_text
        tokenizer.post_processor = post_processor
        if padding:
            tokenizer.enable_padding(**padding)
        if truncation:
            tokenizer.enable_truncation(**truncation)
