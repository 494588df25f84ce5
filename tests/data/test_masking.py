import dataclasses
import json
import pickle
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.conftest import ROOT
from tests.data.test_rows import CHAT_ROWS, PAIR_ROWS
from tests.samples import REAL, chats, needs_real_rows, pairs, read
from tests.small_tokenizers import byte_level, metaspace
from toolkit.data.masking import (
    IGNORE_INDEX,
    MOST_REPLIES,
    Masking,
    TokenizedChat,
    TokenizedLabelled,
    TokenizedPair,
    generation_prompt,
)
from toolkit.data.rows import Labelled, Pair, Reason, to_messages, to_pair
from toolkit.data.template import ChatTemplate, read_template
from toolkit.data.turns import Messages
from toolkit.errors import UserError

WHOLE = 10**9


def template(name: str, bos: str | None = None, eos: str | None = None) -> ChatTemplate:
    return ChatTemplate(read_template(ROOT / "recipes" / "templates" / f"{name}.jinja"), bos, eos)


TOKENIZERS = {"bytes": byte_level, "spaces": lambda: metaspace(False), "prepended": lambda: metaspace(True)}
TOKENS = {  # BOS, end of turn
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "chatml": ("<s>", "<|im_end|>"),
    "chatml_text": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "question_answer": ("<s>", "</s>"),
}


def masking(family: str, name: str, max_length: int = WHOLE, overlong: str = "cut") -> Masking:
    bos, end = TOKENS[name]
    return Masking(TOKENIZERS[family](), template(name, bos, "</s>"), end, max_length, overlong)


ADDED = [token.content for token in byte_level().get_added_tokens_decoder().values()]
FAMILIES = [
    ("bytes", "llama3"),
    ("bytes", "chatml"),
    ("bytes", "chatml_text"),
    ("bytes", "gemma"),
    ("bytes", "question_answer"),
    ("spaces", "chatml"),
    ("spaces", "chatml_text"),
    ("spaces", "gemma"),
    ("spaces", "question_answer"),
]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def trained_runs(result: TokenizedChat) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for label in result.labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens(["<think>"])
    [result] = Masking(tokenizer, LLAMA3, "<|eot_id|>", WHOLE).chats([chat("the", "<think> an")])
    assert tokenizer.token_to_id("<think>") in result.labels


@pytest.mark.parametrize("overlong", ["cut", "drop"])
@pytest.mark.parametrize("max_length", [1, 100, 2000, 2900])
def test_of_many_turns_those_beyond_max_length_change_nothing(
    overlong: str, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = chat(*["the", "an"] * 150)
    mask = masking("bytes", "llama3", max_length, overlong)
    found = mask.chats([row])
    monkeypatch.setattr("toolkit.data.masking.FEW_REPLIES", 1000)
    assert found == mask.chats([row])


@pytest.mark.parametrize(
    ("max_length", "overlong", "dropped"),
    [
        (512, "cut", None),
        (512, "drop", Reason.ANSWER_CUT),
        (2**17, "cut", Reason.TOO_MANY_REPLIES),
    ],
)
@pytest.mark.parametrize("num_turns", [10_000, pytest.param(100_000, marks=pytest.mark.campaign)])
def test_a_row_of_many_turns_takes_time_that_grows_as_it_does(
    num_turns: int, max_length: int, overlong: str, dropped: Reason | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, rendered = ChatTemplate.render, []

    def counted(self: ChatTemplate, messages: Messages, add_generation_prompt: bool = False) -> str:
        rendered.append(len(messages))
        return render(self, messages, add_generation_prompt)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    [result] = masking("bytes", "llama3", max_length, overlong).chats(
        [chat(*["the", "an"] * (num_turns // 2))]
    )
    assert result is dropped if dropped else not isinstance(result, Reason) and result.cut
    assert sum(rendered) < 3 * num_turns + MOST_REPLIES * (MOST_REPLIES + 1)


# Known answers ------------------------------------------------------------------------------------------


def pieces(result: TokenizedChat, tokenizer: Tokenizer) -> list[str]:
    """Trained tokens as they are, masked ones in brackets."""
    texts = [decoded(tokenizer, [i]) for i in result.input_ids]
    return [f"[{t}]" if label == IGNORE_INDEX else t for t, label in zip(texts, result.labels, strict=True)]


def test_llama3_trains_the_reply_and_its_end():
    mask = masking("bytes", "llama3")
    [result] = mask.chats([chat("the the", "an answer", "the", "an")])
    header = ["[<|start_header_id|>]", "[{}]", "[<|end_header_id|>]", "[\n]", "[\n]"]
    assert "".join(pieces(result, mask.tokenizer)).replace("][", "") == (
        "[<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe the<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n]an answer<|eot_id|>"
        "[<|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n]an<|eot_id|>"
    )
    assert pieces(result, mask.tokenizer)[:2] == ["[<|begin_of_text|>]", header[0]]
    assert not result.cut


@pytest.mark.parametrize("family", ["bytes", "spaces", "prepended"])
def test_the_space_before_the_answer_is_trained_with_its_first_word(family):
    mask = masking(family, "question_answer")
    [result] = mask.chats([chat("the", "the answer")])
    runs = trained_runs(result)
    assert len(runs) == 1
    assert decoded(mask.tokenizer, runs[0]).lstrip(" ") == "the answer</s>"
    assert mask.tokenizer.id_to_token(runs[0][0]) == ("Ġthe" if family == "bytes" else "▁the")
    prompt = generation_prompt(mask.template, chat("the"))
    assert prompt.endswith("\n\nAnswer:")
    before = mask.tokenizer.encode(prompt, add_special_tokens=False).ids
    assert result.input_ids[: len(before)] == before  # inference continues exactly what was masked
    assert result.labels[: len(before)] == [IGNORE_INDEX] * len(before)


def test_the_newline_after_the_end_is_masked():
    mask = masking("bytes", "gemma")
    [result] = mask.chats([chat("the", "an")])
    assert pieces(result, mask.tokenizer)[-2:] == ["<end_of_turn>", "[\n]"]


def test_indentation_inside_a_reply_is_trained():
    """The byte-level post-processor gives such tokens empty offsets."""
    mask = masking("bytes", "llama3")
    code = "def f(x):\n        return x\n\n        \n    # end"
    [result] = mask.chats([chat("code", code)])
    [run] = trained_runs(result)
    assert decoded(mask.tokenizer, run) == code + "<|eot_id|>"


def test_settings_of_the_tokenizer_do_not_interfere_and_stay():
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    [expected] = masking("bytes", "llama3").chats([chat("the", "an answer")])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.encode_special_tokens = True
    before = json.loads(tokenizer.to_str())
    mask = Masking(tokenizer, template("llama3", "<|begin_of_text|>"), "<|eot_id|>", WHOLE)
    assert mask.chats([chat("the", "an answer")]) == [expected]
    assert json.loads(tokenizer.to_str()) == before
    assert tokenizer.encode_special_tokens


def test_end_of_turn_must_be_one_token():
    with pytest.raises(UserError, match=r"<\|end\|>' is \d+ tokens"):
        Masking(byte_level(), template("chatml"), "<|end|>", 10)


def test_pairs_share_the_prompt():
    mask = masking("bytes", "llama3")
    [pair] = mask.pairs([Pair(chat("the", "an", "the"), chat("", "yes the")[1:], chat("", "yes an")[1:])])
    text = [decoded(mask.tokenizer, ids) for ids in pair[:3]]
    assert text[0].endswith("the<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert text[1:] == ["yes the<|eot_id|>", "yes an<|eot_id|>"]  # the shared "yes" is reply, not prompt
    assert not pair.cut


@pytest.mark.parametrize(("max_length", "overlong"), [(WHOLE, "drop"), (9, "cut"), (9, "drop"), (5, "cut")])
def test_a_labelled_reply_is_the_last_turn_of_its_conversation(max_length, overlong):
    asked, reply = chat("the", "an", "the"), chat("", "yes the")[1:]
    whole, mask = masking("bytes", "llama3"), masking("bytes", "llama3", max_length, overlong)
    [expected], [got] = whole.chats([asked + reply]), mask.labelled([Labelled(asked, reply, True)])
    start = len(whole.pairs([Pair(asked, reply, chat("", "an")[1:])])[0].prompt_ids)
    if len(expected.input_ids) <= max_length:
        assert got == TokenizedLabelled(expected.input_ids[:start], expected.input_ids[start:], True, False)
    elif start >= max_length:
        assert got is Reason.NO_ROOM
    else:
        assert got is Reason.ANSWER_CUT if overlong == "drop" else got.cut


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("asked", "replies", "expected"),
    [
        ("xt", ("s", "s s"), ["xt", "s</s>", "s s</s>"]),
        ("xt", ("h", "s"), ["x", "th</s>", "ts</s>"]),  # a reply's first letter merges with the prompt's last
        ("xth", ("e", "s"), ["x", "the</s>", "ths</s>"]),  # and so another merge before it does not happen
    ],
)
def test_replies_that_change_the_tokens_before_them(asked, replies, expected, swap):
    vocab = {token: i for i, token in enumerate(["x", "t", "h", "e", "s", " ", "he", "th", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("t", "h")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    source = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    mask = Masking(tokenizer, ChatTemplate(source), "</s>", WHOLE)
    chosen, rejected = (chat("", reply)[1:] for reply in (reversed(replies) if swap else replies))
    [pair] = mask.pairs([Pair(chat(asked), chosen, rejected)])
    texts = [decoded(tokenizer, ids) for ids in pair[:3]]
    assert texts == ([expected[0], expected[2], expected[1]] if swap else expected)


def test_a_space_that_is_a_token_of_its_own_is_trained_too():
    """Before a digit Llama-3 does not glue it; the byte-level post-processor then gives it empty offsets."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    mask = Masking(tokenizer, template("question_answer", None, "</s>"), "</s>", WHOLE)
    [result] = mask.chats([chat("the", "42")])
    assert [decoded(tokenizer, [i]) for i in trained_runs(result)[0]] == [" ", "4", "2", "</s>"]


def test_cutting():
    messages = chat("the", "an answer", "the", "an")
    [whole] = masking("bytes", "llama3").chats([messages])
    first_trained = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    for length in range(1, len(whole.input_ids) + 2):
        [kept] = masking("bytes", "llama3", length).chats([messages])
        [dropped] = masking("bytes", "llama3", length, "drop").chats([messages])
        if length >= len(whole.input_ids):
            assert kept == dropped == whole
        else:
            assert dropped is Reason.ANSWER_CUT
            if length <= first_trained:
                assert kept is Reason.NO_TRAINED_TOKEN
            else:
                assert kept == TokenizedChat(whole.input_ids[:length], whole.labels[:length], cut=True)


def test_cutting_the_newline_after_the_end_cuts_no_answer():
    [whole] = masking("bytes", "gemma").chats([chat("the", "an")])
    [result] = masking("bytes", "gemma", len(whole.input_ids) - 1, "drop").chats([chat("the", "an")])
    assert result == TokenizedChat(whole.input_ids[:-1], whole.labels[:-1], cut=False)


def test_cutting_pairs():
    pair = Pair(chat("the"), chat("", "an answer")[1:], chat("", "an an")[1:])
    [whole] = masking("bytes", "llama3").pairs([pair])
    prompt = len(whole.prompt_ids)
    longest = prompt + max(len(whole.chosen_ids), len(whole.rejected_ids))

    def at(length: int, overlong: str = "cut") -> TokenizedPair | Reason:
        return masking("bytes", "llama3", length, overlong).pairs([pair])[0]

    assert at(longest) == whole
    assert at(prompt) is Reason.NO_ROOM
    assert at(prompt + 1) is Reason.EQUAL_AFTER_CUT
    cut = at(longest - 1)
    assert cut.cut
    assert max(len(cut.chosen_ids), len(cut.rejected_ids)) == longest - 1 - prompt
    assert at(longest - 1, "drop") is Reason.ANSWER_CUT
    assert at(prompt, "drop") is Reason.NO_ROOM


UNCLOSED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content if loop.last else '...' }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
LLAMA3 = template("llama3", "<|begin_of_text|>")
UNMASKABLE = [
    (LLAMA3, "<|eot_id|>", chat("the <|eot_id|>", "an"), Reason.SPECIAL_TOKEN_IN_TEXT),
    (LLAMA3, "<|eot_id|>", chat("the", "an <|begin_of_text|>"), Reason.SPECIAL_TOKEN_IN_TEXT),
    (LLAMA3, "<|eot_id|>", chat("the", "an <|end_of_text|>"), Reason.SPECIAL_TOKEN_IN_TEXT),
    (LLAMA3, "<|eot_id|>", chat("the <bos>", "an"), Reason.SPECIAL_TOKEN_IN_TEXT),  # of another template
    (LLAMA3, "<|eot_id|>", chat("the \ud83d", "an"), Reason.BROKEN_TEXT),
    (
        template("gemma"),
        "<end_of_turn>",
        [{"role": "system", "content": "the"}, *chat("the", "an")],
        Reason.TEMPLATE_REFUSED,
    ),
    (ChatTemplate(FORGETFUL), "<|eot_id|>", chat("the", "an", "the", "an"), Reason.TEMPLATE_UNSTABLE),
    (ChatTemplate(UNCLOSED), "<|eot_id|>", chat("the", "an"), Reason.NO_END_OF_TURN),
]


@pytest.mark.parametrize(("chosen", "end", "messages", "expected"), UNMASKABLE)
def test_conversations_that_cannot_be_masked(chosen, end, messages, expected):
    mask = Masking(byte_level(), chosen, end, WHOLE)
    good = chat("the", "an")
    first, result, last = mask.chats([good, messages, good])
    assert result is expected
    assert first == last  # neighbours in the batch are not touched
    assert mask.pairs([Pair(messages[:-1], messages[-1:], chat("", "the")[1:])]) == [expected]


def test_every_reason_can_happen(monkeypatch):
    monkeypatch.setattr("toolkit.data.masking.MOST_REPLIES", 70)
    many = chat(*["the", "an"] * 100)
    happened = {to_messages(row, schema) for schema, row, out in CHAT_ROWS if isinstance(out, Reason)}
    happened |= {to_pair(row, schema) for schema, row, out in PAIR_ROWS if isinstance(out, Reason)}
    for chosen, end, messages, _ in (*UNMASKABLE, (LLAMA3, "<|eot_id|>", many, None)):
        results = Masking(byte_level(), chosen, end, WHOLE).chats([messages])
        happened.update(result for result in results if isinstance(result, Reason))
    pair = Pair(chat("the"), chat("", "an answer")[1:], chat("", "an an")[1:])
    for length in range(1, 40):
        for overlong in ("cut", "drop"):
            mask = masking("bytes", "llama3", length, overlong)
            results = mask.pairs([pair]) + mask.chats([chat("the", "an")])
            happened.update(result for result in results if isinstance(result, Reason))
    assert happened == set(Reason)
    assert all(reason.sentence for reason in Reason)


def test_equal_replies_after_tokenising():
    mask = Masking(metaspace(False), template("chatml"), "<|im_end|>", WHOLE)
    pair = Pair(chat("the"), chat("", "an\u2581a")[1:], chat("", "an a")[1:])  # the normalizer makes them one
    assert mask.pairs([pair]) == [Reason.EQUAL_REPLIES]


def test_a_template_that_does_not_trim_still_gives_exact_spans():
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    mask = Masking(byte_level(), ChatTemplate(source), "<|im_end|>", WHOLE)
    [result] = mask.chats([chat(" the ", " an \n", "the", "an")])
    assert [decoded(mask.tokenizer, run) for run in trained_runs(result)] == [
        " an \n<|im_end|>",
        "an<|im_end|>",
    ]


def test_survives_pickling():
    mask = pickle.loads(pickle.dumps(masking("bytes", "llama3")))
    assert mask.chats([chat("the", "an")]) == masking("bytes", "llama3").chats([chat("the", "an")])


def test_nothing_to_do():
    assert masking("bytes", "llama3").chats([]) == []
    assert masking("bytes", "llama3").pairs([Reason.NO_TURNS]) == [Reason.NO_TURNS]


# Properties ---------------------------------------------------------------------------------------------

SPECIAL_TOKENS = {"</s>"}.union(*TOKENS.values(), *(t.special_tokens(ADDED) for t in map(template, TOKENS)))
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1, max_size=12),
    st.text(" \n\tthean(1.:", min_size=1, max_size=20),
).filter(lambda text: text.strip() and not any(token in text for token in SPECIAL_TOKENS))
CHATS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4).map(
    lambda turns: chat(*(text for turn in turns for text in turn))
)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@settings(max_examples=60, deadline=None)
@given(messages=CHATS)
def test_trained_tokens_are_the_replies_with_their_ends(family, name, messages):
    mask = masking(family, name)
    [result] = mask.chats([messages])
    replies = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    texts = [decoded(mask.tokenizer, run) for run in trained_runs(result)]
    assert [text.removeprefix(" ") if name == "question_answer" else text for text in texts] == [
        reply + mask.end_of_turn for reply in replies
    ]
    plain = mask.tokenizer.encode(mask.template.render(messages), add_special_tokens=False).ids
    assert result.input_ids == plain
    assert all(label in (IGNORE_INDEX, i) for label, i in zip(result.labels, result.input_ids, strict=True))
    assert result.num_trained == sum(map(len, trained_runs(result)))
    bos = mask.tokenizer.token_to_id(mask.template.bos_token)
    assert result.input_ids.count(bos) == 1
    assert result.input_ids[0] == bos


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@settings(max_examples=40, deadline=None)
@given(messages=CHATS, max_length=st.integers(1, 120))
def test_cutting_only_shortens(family, name, messages, max_length):
    [whole] = masking(family, name).chats([messages])
    [cut] = masking(family, name, max_length).chats([messages])
    if cut is Reason.NO_TRAINED_TOKEN:
        assert set(whole.labels[:max_length]) == {IGNORE_INDEX}
    else:
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:max_length], whole.labels[:max_length])
        assert cut.cut == (cut.num_trained < whole.num_trained)
    [dropped] = masking(family, name, max_length, "drop").chats([messages])
    assert dropped == cut or (dropped is Reason.ANSWER_CUT and (cut is Reason.NO_TRAINED_TOKEN or cut.cut))


@settings(max_examples=60, deadline=None)
@given(messages=CHATS)
def test_a_prepended_space_changes_no_trained_text(messages):
    mask = masking("prepended", "question_answer")
    [result] = mask.chats([messages])
    texts = [decoded(mask.tokenizer, run).removeprefix(" ") for run in trained_runs(result)]
    assert texts == [m["content"].strip() + "</s>" for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@settings(max_examples=40, deadline=None)
@given(messages=CHATS, other=TEXT, max_length=st.integers(1, 120))
def test_pairs_decode_to_their_renders_and_cutting_only_shortens(family, name, messages, other, max_length):
    pair = Pair(messages[:-1], messages[-1:], chat("", other)[1:])
    assume(pair.chosen[0]["content"].strip() != other.strip())
    mask = masking(family, name)
    [whole] = mask.pairs([pair])
    for reply, ids in ((pair.chosen, whole.chosen_ids), (pair.rejected, whole.rejected_ids)):
        render = mask.template.render(pair.prompt + reply)
        assert decoded(mask.tokenizer, whole.prompt_ids + ids) == render.rstrip("\n")
        assert ids[-1] == mask.tokenizer.token_to_id(mask.end_of_turn)
    [cut] = masking(family, name, max_length).pairs([pair])
    if isinstance(cut, Reason):
        assert cut in (Reason.NO_ROOM, Reason.EQUAL_AFTER_CUT)
    else:
        assert cut.prompt_ids == whole.prompt_ids
        for after, before in ((cut.chosen_ids, whole.chosen_ids), (cut.rejected_ids, whole.rejected_ids)):
            assert after == before[: max_length - len(whole.prompt_ids)]
        assert cut.cut == (cut != whole)
        assert cut.chosen_ids != cut.rejected_ids


# Rows as public sets have them ---------------------------------------------------------------------------


Sets = tuple[Tokenizer, list[Messages], list[Pair]]
PUBLIC_CHATS = ("fastchat_dummy_conversation", "lf_alpaca_en_demo")
PUBLIC_PAIRS = ("lf_dpo_en_demo", "rasbt_instruction_preference")


@pytest.fixture(scope="module", params=["samples", pytest.param("public rows", marks=needs_real_rows)])
def sets(request: pytest.FixtureRequest) -> Sets:
    if request.param == "samples":
        asked = [chat for name in ("sharegpt", "messages", "alpaca") for chat in chats(name)]
        names = ("conversations_chosen_rejected", "instruction_chosen_rejected", "chatml")
        return byte_level(), asked, [pair for name in names for pair in pairs(name)]
    asked = [chat for name in PUBLIC_CHATS for chat in read(REAL / "sft" / f"{name}.jsonl", "chat")]
    found = [pair for name in PUBLIC_PAIRS for pair in read(REAL / "pref" / f"{name}.jsonl", "pair")]
    tokenizer = Tokenizer.from_file(str(REAL / "tokenizers" / "llama3" / "tokenizer.json"))
    return tokenizer, asked, [pair for pair in found if isinstance(pair, Pair)]


def reason_not_to_mask(messages: Messages, name: str) -> Reason | None:
    if any("<|eot_id|>" in turn["content"] for turn in messages):
        return Reason.SPECIAL_TOKEN_IN_TEXT
    refused = name == "question_answer" and {turn["role"] for turn in messages} - {"user", "assistant"}
    return Reason.TEMPLATE_REFUSED if refused else None


@pytest.mark.parametrize("name", ["llama3", "question_answer"])
def test_chats_train_exactly_their_replies(sets: Sets, name: str) -> None:
    tokenizer, asked, _ = sets
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    mask = Masking(tokenizer, template(name, bos, eos), eos, WHOLE)
    for messages, result in zip(asked, mask.chats(asked), strict=True):
        reason = reason_not_to_mask(messages, name)
        if reason is None:
            texts = [decoded(tokenizer, run).removeprefix(" ") for run in trained_runs(result)]
            assert texts == [m["content"].strip() + eos for m in messages if m["role"] == "assistant"]
            assert result.input_ids.count(tokenizer.token_to_id(bos)) == 1
        else:
            assert result is reason


def test_pairs_hold_their_prompt_and_their_replies(sets: Sets) -> None:
    tokenizer, _, found = sets
    source = template("llama3", "<|begin_of_text|>", "<|eot_id|>")
    results = Masking(tokenizer, source, "<|eot_id|>", WHOLE).pairs(found)
    for pair, result in zip(found, results, strict=True):
        if reason := reason_not_to_mask([*pair.prompt, *pair.chosen, *pair.rejected], "llama3"):
            assert result is reason
            continue
        assert decoded(tokenizer, result.prompt_ids) == source.render(pair.prompt, add_generation_prompt=True)
        assert decoded(tokenizer, result.chosen_ids) == pair.chosen[0]["content"].strip() + "<|eot_id|>"
        assert decoded(tokenizer, result.rejected_ids) == pair.rejected[0]["content"].strip() + "<|eot_id|>"
    short = Masking(tokenizer, source, "<|eot_id|>", 512).pairs(found)
    counts = Counter(result if isinstance(result, Reason) else "used" for result in short)
    assert counts["used"] and set(counts) <= {"used", Reason.NO_ROOM, Reason.SPECIAL_TOKEN_IN_TEXT}


def test_a_blank_behind_the_generation_prompt_changes_no_label() -> None:
    mine = masking("bytes", "question_answer")
    blank = dataclasses.replace(mine.template, source=mine.template.source.replace('"Answer:"', '"Answer: "'))
    other = Masking(mine.tokenizer, blank, mine.end_of_turn, WHOLE)
    rows = [chat("the", "an"), chat("the", "an answer", "an", "the "), chat("the", "  an")]
    assert blank != mine.template and mine.chats(rows) == other.chats(rows)
