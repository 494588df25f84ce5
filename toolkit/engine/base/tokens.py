"""The tokens that a template writes: set alike on every backend, and known to the model, or the run stops.

A base model's vocabulary holds tokens that its pre-training never used. LoRA leaves embedding and head as they are, so
a run on such tokens cannot mend them: an input row of zeros says nothing, and where a token's head row equals those of
others the model cannot tell them apart. In Llama-3.1-8B the header and end-of-turn tokens are such ones (unsloth#915,
#1024): greedy answers then end in a reserved token, or never.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from toolkit.data.template import ChatTemplate, TemplateRefused, read_template
from toolkit.data.template_check import pad_problem
from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe

# Shares of the median row norm of the same matrix.
UNTRAINED = 0.5  # rows below have hardly moved from their initialisation: said
ZERO = 1e-3  # rows below are none: refused
# Of a head row's own norm: another row nearer than this gives the same logits in bf16, whose steps are 2^-8 = 4e-3.
EQUAL = 1e-3
ROWS_AT_ONCE = 8192  # of the head, in fp32: 128 MiB at a width of 4,096


class Row(NamedTuple):
    """What embedding and head know of one token; norms as shares of their median, `num_equal` other head rows."""

    token: str
    input_norm: float
    head_norm: float
    num_equal: int

    @property
    def is_zero(self) -> bool:
        return self.input_norm <= ZERO

    @property
    def is_repeated(self) -> bool:
        return self.num_equal > 0


def set_tokens(recipe: Recipe, model: Any, tokenizer: Any) -> ChatTemplate:
    """Template, padding and both end tokens, set alike on every backend (Unsloth's two backends pad differently).

    `model` may be None. Raises UserError when the tokenizer lacks a token, or pad would be an end token.
    """
    section, vocabulary = recipe.template, tokenizer.get_vocab()
    problems = [
        f"template.{key} {token!r} is not in the vocabulary of {recipe.model.path}; "
        f"its special tokens are {', '.join(tokenizer.all_special_tokens[:12])}"
        for key, token in (("end_of_turn", section.end_of_turn), ("pad_token", section.pad_token))
        if token not in vocabulary
    ]
    if unknown := [token for token in recipe.lora.trainable_tokens if token not in vocabulary]:
        problems.append(
            f"lora.trainable_tokens: {', '.join(map(repr, unknown))} not in the vocabulary of {recipe.model.path}: "
            "name tokens of its tokenizer.json"
        )
    if problem := pad_problem(recipe, tokenizer.eos_token):
        problems.append(problem)
    if section.file == "tokenizer" and not tokenizer.chat_template:
        problems.append(f"template.file is 'tokenizer' but {recipe.model.path} ships no chat template")
    if problems:
        raise UserError(*problems)
    if section.file != "tokenizer":
        tokenizer.chat_template = read_template(recipe.locate(section.file), recipe.looked_in(section.file))
    tokenizer.pad_token = section.pad_token
    if model is not None:
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(section.end_of_turn)}
        if hasattr(model, "generation_config"):  # a model that gives a score writes nothing
            model.generation_config.eos_token_id = sorted(ends - {None})
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    given = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    template = given.without_trailing_blank()
    tokenizer.chat_template = template.source  # what an adapter and an export are saved with
    return template


def check_known(recipe: Recipe, model: Any, tokenizer: Any, template: ChatTemplate) -> list[str]:
    """Notes on the template's tokens that the model hardly knows.

    Raises UserError, before anything is trained, for those that it does not know at all: a zero input row, or a head
    row that equals another's.
    """
    special = {recipe.template.end_of_turn, *template.special_tokens(_added(tokenizer))}
    trained = set(recipe.lora.trainable_tokens)
    rows = [
        row
        for row in rows_of(model, tokenizer, written(special, tokenizer, template))
        if row.token not in trained
    ]
    zero = [row.token for row in rows if row.is_zero]
    equal = [row for row in rows if row.is_repeated]
    problems = []
    if zero:
        problems.append(f"the input embeddings of {', '.join(zero)} are zero: the model cannot read them")
    if equal:
        listed = ", ".join(f"{row.token} (with {row.num_equal} others)" for row in equal)
        problems.append(
            f"the output rows of {listed} repeat: the model cannot tell these tokens apart, so the loss on them has a "
            "floor and answers do not end"
        )
    if problems:
        raise UserError(
            f"template.file {recipe.template.file} writes tokens that {recipe.model.path} was never trained on: "
            f"{'; '.join(problems)}. LoRA leaves these rows as they are. Take a template of tokens that it knows: "
            f"--set template.file=templates/chatml_text.jinja --set template.end_of_turn='{tokenizer.eos_token}', or "
            "the Instruct version of the model. (Without a GPU, lora.trainable_tokens trains such rows.)"
        )
    return _notes([row for row in rows if row.token in special])  # a common word may have a short row


def written(special: Iterable[str], tokenizer: Any, template: ChatTemplate) -> list[str]:
    """Every token that the template writes around turns, the `special` ones and those that make up its text."""
    ids: set[int] = {tokenizer.convert_tokens_to_ids(token) for token in special}
    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
    for messages in ([user, reply, user, reply], [{"role": "system", "content": "a"}, user, reply]):
        try:
            text = template.render(messages)
        except TemplateRefused:  # no system turns, say
            continue
        ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids))]


def rows_of(model: Any, tokenizer: Any, tokens: Sequence[str]) -> list[Row]:
    """Norms, and how many other rows of the head are equal. Reads head and embedding once, in pieces.

    A model without a head over the vocabulary cannot confuse its tokens: each counts as well known there.
    """
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))
    given = _norms(model.get_input_embeddings().weight.detach(), ids)
    if model.get_output_embeddings() is None:
        return [Row(token, norm, 1.0, 0) for token, norm in zip(tokens, given, strict=True)]
    head = model.get_output_embeddings().weight.detach()
    own = head[ids.to(head.device)].float()
    limits = EQUAL * own.norm(dim=1, keepdim=True)
    num_equal = sum(
        (torch.cdist(own, part.float(), compute_mode="donot_use_mm_for_euclid_dist") <= limits).sum(1)
        for part in head.split(ROWS_AT_ONCE)
    )
    assert isinstance(num_equal, torch.Tensor)
    return [
        Row(token, one, taken, count - 1)  # itself
        for token, one, taken, count in zip(tokens, given, _norms(head, ids), num_equal.tolist(), strict=True)
    ]


def _norms(matrix: Any, ids: torch.Tensor) -> list[float]:
    """Those of these rows, as shares of the median."""
    norms = torch.cat([part.float().norm(dim=1) for part in matrix.split(ROWS_AT_ONCE)])
    return (norms[ids.to(norms.device)] / norms.median()).tolist()


def _added(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for name, low in (
        ("input", {row.token: row.input_norm for row in rows if row.input_norm < UNTRAINED}),
        ("output", {row.token: row.head_norm for row in rows if row.head_norm < UNTRAINED}),
    ):
        if low:
            listed = ", ".join(f"{token} {share:.2f}" for token, share in low.items())
            notes.append(
                f"nearly untrained {name} embeddings (norm against the median): {listed}. The base model hardly used "
                "these tokens and LoRA does not change them: expect a slower start, and check that answers end."
            )
    return notes
