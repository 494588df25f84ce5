"""A chat template becomes an Ollama Modelfile whose conversations render as Jinja renders them, or is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.data.template import ChatTemplate, read_template
from toolkit.errors import UserError
from toolkit.export.modelfile import adds_bos, pieces, write

SHIPPED = sorted((ROOT / "recipes" / "templates").glob("*.jinja"))
REAL = ROOT.parent / "shared" / "data" / "templates"
TALK = [
    {"role": "user", "content": "Was heißt „Hund“?"},
    {"role": "assistant", "content": "dog 🐕"},
    {"role": "user", "content": "And {{ cat }}?"},
]


def chat(path: Path) -> ChatTemplate:
    return ChatTemplate(read_template(path), "<bos>", "<eos>")


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Runs the few words of Go's text/template that a Modelfile here is made of, so that the text itself is tested."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    tokens = re.split(r"(\{\{ .*? \}\})", template)

    def block(place: int, scope: dict[str, str], active: bool) -> tuple[str, int]:
        out, taken, live = "", True, active
        while place < len(tokens):
            word = tokens[place].removeprefix("{{ ").removesuffix(" }}")
            if not tokens[place].startswith("{{ "):
                out += tokens[place] if live else ""
            elif word == '"{{"':
                out += "{{" if live else ""
            elif word in (".System", ".Content"):
                out += (system if word == ".System" else scope["content"]) if live else ""
            elif word == "range .Messages":
                begin, parts = place + 1, []
                for message in messages:
                    text, place = block(begin, message, live)
                    parts.append(text)
                out += "".join(parts)
            elif word.startswith("if "):
                text, place = branch(place, scope, live)
                out += text
            elif word.startswith("else") or word == "end":
                return out, place
            else:
                raise AssertionError(f"a word that Ollama may not know: {word}")
            place += 1
        assert taken
        return out, place

    def branch(place: int, scope: dict[str, str], active: bool) -> tuple[str, int]:
        done, out = False, ""
        while True:
            word = tokens[place].removeprefix("{{ ").removesuffix(" }}").removeprefix("else ")
            if word == "end":
                return out, place
            holds = (
                bool(system)
                if word == "if .System"
                else word == "else" or word == f'if eq .Role "{scope.get("role")}"'
            )
            text, place = block(place + 1, scope, active and holds and not done)
            out, done = out + text, done or holds

    return block(0, {}, True)[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_template_renders_the_same_in_ollama(path: Path) -> None:
    template = chat(path)
    text = write(template, True, "model.gguf", ["<end>", "<eos>", "<end>"])
    body = text.partition('TEMPLATE """')[2].partition('"""')[0]
    talks = [TALK[:1], TALK]
    if pieces(template, True).system:
        talks += [[{"role": "system", "content": "Be kind."}, *TALK]]
    else:
        assert "no system turns" in text
    for talk in talks:
        assert go(body, talk) == template.render(talk, True).removeprefix("<bos>").rstrip(" ")
    assert text.count("PARAMETER stop") == 2 and 'PARAMETER stop "<end>"' in text
    assert "FROM ./model.gguf\n" in text


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "gemma-2-2b-it", "axolotl_chatml"])
def test_published_templates_are_said_or_refused_with_a_reason(name: str) -> None:
    if not (REAL / f"{name}.jinja").is_file():
        pytest.skip(f"no copy of the published template in {REAL}")
    template = chat(REAL / f"{name}.jinja")
    body = write(template, True, "m.gguf", ["<end>"]).partition('TEMPLATE """')[2].partition('"""')[0]
    for talk in (TALK[:1], TALK):
        assert go(body, talk) == template.render(talk, True).removeprefix("<bos>").rstrip(" ")


def test_the_bos_token_stays_where_the_runtime_adds_none() -> None:
    template = chat(ROOT / "recipes" / "templates" / "llama3.jinja")
    assert pieces(template, False).opening == "<bos>" and pieces(template, True).opening == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (  # Llama-2's way: the system text inside the first user turn
            "{% if messages[0].role == 'system' %}{% set s = '<<' ~ messages[0].content ~ '>>' %}"
            "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
            "{{ '[' ~ (s if loop.first else '') ~ m.content ~ ']' }}{% endfor %}",
            "inside the user's turn",
        ),
        ("{% for m in messages[-1:] %}<{{ m.role }}>{{ m.content }}{% endfor %}", "drops or reorders"),
        (
            "{% for m in messages %}<{{ m.role }}{{ loop.index }}>{{ m.content }}{% endfor %}",
            "cannot say",
        ),
    ],
)
def test_what_cannot_be_said_is_refused(source: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        write(ChatTemplate(source), False, "m.gguf", ["<end>"])


def test_a_tokenizer_that_writes_bos_itself_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    base = ROOT / "recipes" / "tiny" / "base"
    assert adds_bos(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((base / name).read_text())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert not adds_bos(tmp_path)
