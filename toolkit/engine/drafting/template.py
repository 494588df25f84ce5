"""The template of a recipe: the tokenizer's own, else the family's, else ChatML in tokens that the model knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from toolkit.data.template import ChatTemplate, TemplateRefused, read_template
from toolkit.drafting.draft import GIVEN, Draft
from toolkit.drafting.facts import TemplateFacts
from toolkit.engine.base import tokens
from toolkit.engine.drafting.base import Base
from toolkit.errors import UserError
from toolkit.recipe.load import RECIPES
from toolkit.recipe.schema import Recipe

TEMPLATES = RECIPES / "templates"
# By the tokens that a family's vocabulary has for turns
FAMILIES = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
REPLY = "reply"


def choose(
    base: Base, draft: Draft, recipe_with: Callable[[TemplateFacts], Recipe]
) -> tuple[TemplateFacts, list[str], list[str]]:
    """The first template that ends its replies in a token, and whose tokens the model knows where its weights are here.

    Returns it, what is to be asked for, and what else is to be said. `recipe_with` makes the recipe that holds it.
    """
    passed_over: list[str] = []
    facts, problems = TemplateFacts("", "", "", True, "", "", ""), list[str]()
    locate = recipe_with(facts).locate
    for file, why in _candidates(base.tokenizer, draft):
        try:
            source = base.tokenizer.chat_template if file == "tokenizer" else read_template(locate(file))
            template = ChatTemplate(source, base.tokenizer.bos_token, base.tokenizer.eos_token)
            facts, problems = _with_tokens(file, why, template, base.tokenizer, draft)
            if problems:
                continue
            notes = _check(recipe_with(facts), base)
        except UserError as error:
            passed_over += error.problems
            problems = list(error.problems)
            continue
        return facts, [], [*(f"passed over: {problem}" for problem in passed_over), *notes]
    return facts, problems, passed_over


def _candidates(tokenizer: Any, draft: Draft) -> Iterator[tuple[str, str]]:
    if given := draft.given("template.file"):
        yield given, GIVEN
        return
    if tokenizer.chat_template:
        yield "tokenizer", "the model's own"
    vocabulary = tokenizer.get_vocab()
    for family, marks in FAMILIES.items():
        if all(mark in vocabulary for mark in marks):
            yield str(TEMPLATES / f"{family}.jinja"), f"its tokens {' '.join(marks)} are in the vocabulary"
    yield str(TEMPLATES / "chatml_text.jinja"), "ChatML in ordinary text: every token of it is known"


def _with_tokens(
    file: str, why: str, template: ChatTemplate, tokenizer: Any, draft: Draft
) -> tuple[TemplateFacts, list[str]]:
    end, pad = draft.given("template.end_of_turn"), draft.given("template.pad_token")
    why_end, why_pad, problems = GIVEN, GIVEN, []
    if end is None:
        end, why_end = _end_of_turn(template, tokenizer), "what the template writes behind a reply"
        if not end:
            problems.append(
                f"template {file} ends no reply in a token of this tokenizer: name it with --set "
                "template.end_of_turn=TOKEN, or another template with --set template.file=FILE"
            )
    if pad is None:
        pad, why_pad = _pad_token(template, tokenizer, end)
        if not pad:
            problems.append(
                "no token to pad with: the tokenizer names none but an end token, and none that is reserved; name one "
                "that no text holds with --set template.pad_token=TOKEN"
            )
    return TemplateFacts(file, end, pad, _has_system(template), why, why_end, why_pad), problems


def _end_of_turn(template: ChatTemplate, tokenizer: Any) -> str:
    """The first token behind a reply; "" where there is none."""
    try:
        told = template.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": REPLY}])
    except TemplateRefused:
        return ""
    behind = told.rpartition(REPLY)[2]
    added = [*_added(tokenizer), tokenizer.eos_token]
    found = {behind.index(token): token for token in added if token and token in behind}
    return found[min(found)] if found else ""


def _pad_token(template: ChatTemplate, tokenizer: Any, end_of_turn: str) -> tuple[str, str]:
    """A token that no row holds, and why that one."""
    added = _added(tokenizer)
    taken = {end_of_turn, tokenizer.eos_token, *template.special_tokens(added)}
    for why, tokens_of_kind in (
        ("the tokenizer's own", [tokenizer.pad_token]),
        ("a token for padding of another use", [token for token in added if "pad" in token.lower()]),
        ("the tokenizer falls back to bytes or never writes it", [tokenizer.unk_token]),
        ("reserved, in no text", [token for token in added if "reserved" in token or "unused" in token]),
    ):
        if found := next((token for token in tokens_of_kind if token and token not in taken), None):
            return found, f"{why}; no end token, so ends stay in the loss"
    return "", ""


def _has_system(template: ChatTemplate) -> bool:
    try:
        template.render([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}])
    except TemplateRefused:
        return False
    return True


def _check(recipe: Recipe, base: Base) -> list[str]:
    """Sets the tokens as a run does, and looks at them where the weights are here."""
    template = tokens.set_tokens(recipe, None, base.tokenizer)
    if base.matrices is None:
        return [
            "the weights are not on this machine: whether the model knows the template's tokens is checked at load"
        ]
    return tokens.check_known(recipe, base.matrices, base.tokenizer, template)


def _added(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]
