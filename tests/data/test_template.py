import pickle
from pathlib import Path

import jinja2
import pytest

from tests.small_tokenizers import byte_level
from toolkit.data.template import ChatTemplate, TemplateRefused, read_template
from toolkit.errors import UserError

TEMPLATES = sorted((Path(__file__).parents[2] / "recipes" / "templates").glob("*.jinja"))
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "templates"
CHAT = [
    {"role": "user", "content": "  What is one? "},
    {"role": "assistant", "content": "\nOne is\n\n  a number. \n"},
    {"role": "user", "content": "And <b>two</b>?"},
    {"role": "assistant", "content": "So is that."},
]
SYSTEM = [{"role": "system", "content": "Be kind. "}]
ADDED = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_end|>", "</s>"]


def shipped(name: str, bos: str | None = "<s>", eos: str | None = "</s>") -> ChatTemplate:
    return ChatTemplate(read_template(TEMPLATES[0].parent / f"{name}.jinja"), bos, eos)


def test_known_renders():
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    assert shipped("llama3").render(SYSTEM + CHAT[:2], add_generation_prompt=True) == (
        "<s>"
        + turn.format("system", "Be kind.")
        + turn.format("user", "What is one?")
        + turn.format("assistant", "One is\n\n  a number.")
        + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert shipped("chatml", bos=None).render(CHAT[2:]) == (
        "<|im_start|>user\nAnd <b>two</b>?<|im_end|>\n<|im_start|>assistant\nSo is that.<|im_end|>\n"
    )
    assert shipped("gemma", bos="<bos>").render(CHAT[2:3], add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nAnd <b>two</b>?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert shipped("question_answer").render(CHAT) == (
        "<s>Question: What is one?\n\nAnswer: One is\n\n  a number.</s>"
        "Question: And <b>two</b>?\n\nAnswer: So is that.</s>"
    )


TRICKY = """
{%- set ns = namespace(n=0) -%}
  {% for m in messages %}
    {% if loop.index0 > 2 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
{{ m | tojson }}{{ m.content | trim | tojson(indent=2) }} {{ ns.n }}
    {% if m['role'] == 'assistant' %}
{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
  {% endfor %}
{{ tools is none }} {{ bos_token is defined }} {{ missing is defined }}
{% if add_generation_prompt %}...{% endif %}
"""


@pytest.mark.parametrize(
    "source",
    [*(pytest.param(path.read_text(), id=path.stem) for path in TEMPLATES), pytest.param(TRICKY, id="tricky")]
    + [pytest.param(path.read_text(), id=path.stem) for path in sorted(SAMPLES.glob("*.jinja"))],
)
@pytest.mark.parametrize("bos", ["<|begin_of_text|>", None])
def test_renders_as_transformers_does(source, bos):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token=bos, eos_token="</s>")
    template = ChatTemplate(source, bos, "</s>")
    for messages in (CHAT, CHAT[:3], CHAT[:1], SYSTEM + CHAT):
        for prompt in (False, True):
            try:
                expected = tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
                )
            except Exception:
                with pytest.raises(TemplateRefused):
                    template.render(messages, prompt)
            else:
                assert template.render(messages, prompt) == expected


@pytest.mark.parametrize("name", ["gemma", "question_answer"])
def test_system_turn_is_refused_in_the_template_s_words(name):
    with pytest.raises(TemplateRefused, match=f"{name} has no turn for the role system"):
        shipped(name).render(SYSTEM + CHAT)


def test_tool_turn_is_rendered_where_there_is_one():
    tool = [*CHAT[:2], {"role": "tool", "content": "42"}]
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>" in shipped("llama3").render(tool)
    with pytest.raises(TemplateRefused):
        shipped("gemma").render(tool)


def test_dates_are_fixed():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([]) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (shipped("llama3", "<|begin_of_text|>"), ADDED[:4]),
        (shipped("chatml", None), ["<|im_end|>"]),
        (shipped("question_answer"), ["</s>"]),
        (ChatTemplate("{# <|eot_id|> #}plain"), []),
    ],
)
def test_special_tokens_that_the_template_writes(template, expected):
    assert template.special_tokens(ADDED) == expected


def test_markers_are_found_whether_the_tokenizer_knows_them_or_not():
    assert shipped("chatml_text").markers() == ["<|im_start|>"]
    assert "<end_of_turn>" in shipped("gemma").markers()
    assert shipped("question_answer").markers() == []


def test_templates_cannot_reach_out():
    with pytest.raises(TemplateRefused):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])
    with pytest.raises(TemplateRefused):
        ChatTemplate("{% set _ = messages.append(1) %}").render([])


def test_bad_source_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"line 2: .*endfor"):
        ChatTemplate("{% for m in messages %}\n{% endif %}")
    with pytest.raises(UserError, match=r"none\.jinja"):
        read_template(tmp_path / "none.jinja")


def test_survives_pickling_and_is_compiled_once(monkeypatch):
    template = pickle.loads(pickle.dumps(shipped("llama3")))
    expected = template.render(CHAT)
    monkeypatch.delattr(jinja2.Environment, "compile")
    assert template.render(CHAT) == expected


@pytest.mark.parametrize(
    "expression",
    ["1 / 0", "2.0 ** 9999", "'%d' % 'x'", "(messages | list)[0].content.index('zzz')"],
)
def test_whatever_a_template_raises_is_its_refusal(expression: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate("{{ " + expression + " }}").render(CHAT)


def test_a_template_that_calls_itself_for_ever_is_refused() -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").render(CHAT)


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + " }}", "{{ " + "9" * 5000 + " }}"])
def test_a_template_that_cannot_be_compiled(source: str) -> None:
    with pytest.raises(UserError, match="The chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda path: path.stem)
def test_a_shipped_template_leaves_no_blank_for_a_reader_to_strip(file: Path) -> None:
    template = ChatTemplate(read_template(file), "<s>", "</s>")
    assert not template.render(CHAT[:1], add_generation_prompt=True).endswith(" ")
    assert template.without_trailing_blank() is template


@pytest.mark.parametrize("begin", ["", "\n", "  "])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_blank_behind_the_generation_prompt_is_taken_off_by_the_template_itself(
    begin: str, end: str
) -> None:
    loop = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    given = ChatTemplate(begin + loop + end + "{% if add_generation_prompt %}assistant:  {% endif %}")
    found = given.without_trailing_blank()
    for messages in (CHAT[:1], CHAT[:2], CHAT):
        assert found.render(messages) == given.render(messages)
        asked = found.render(messages, add_generation_prompt=True)
        assert asked == given.render(messages, add_generation_prompt=True).rstrip(" ") and asked.endswith(":")


def test_a_conversation_that_is_scored_ends_with_the_token_that_closes_its_last_reply() -> None:
    chatml = shipped("chatml").ending_with("<|im_end|>")
    assert shipped("chatml").render(CHAT) == chatml.render(CHAT) + "\n"
    assert chatml.render(CHAT).endswith("So is that.<|im_end|>")
    assert chatml.render(CHAT[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    llama3 = shipped("llama3")
    assert llama3.ending_with("<|eot_id|>") is llama3, "it ends so by itself"
