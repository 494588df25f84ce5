"""A recipe for a model and rows, written and planned: everything that has to be asked for is asked for at once."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit import cards, hardware
from toolkit.console.screen import bar
from toolkit.data import sets
from toolkit.drafting import choices
from toolkit.drafting.draft import Draft
from toolkit.drafting.facts import RowFacts, TemplateFacts
from toolkit.drafting.request import Request
from toolkit.engine.data import examples
from toolkit.engine.drafting import base, rows, template
from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe


def write(request: Request, console: Console) -> tuple[Recipe, list[Plan]]:
    """Writes the recipe; returns it and the plan of each stage.

    Raises UserError with all that is wrong with model, template and sets; nothing is written then.
    """
    machine = hardware.here()
    card = cards.card(request.gpu) if request.gpu else machine.card
    name = next((key for key, known in cards.CARDS.items() if known == card), None)
    found = base.look_at(request.model, request.draft)

    def recipe_with(facts: TemplateFacts) -> Recipe:
        return request.draft.with_choices(choices.of_model(request, found.facts, facts, name)).recipe()

    facts, problems, notes = template.choose(found, request.draft, recipe_with)
    if (
        found.facts.is_quantised
        and not found.facts.base_16bit
        and not request.draft.is_given("model.base_16bit")
    ):
        problems.append(
            f"model {found.facts.path} is quantised, and the 16-bit weights that it was made from are not known: "
            "exports merge onto them. Name them with --set model.base_16bit=ID|FOLDER, or do without: =null"
        )
    for stage in request.stages:
        recipe = recipe_with(facts)
        problems += sets.problems(recipe, recipe.section(stage.name), stage.row_kind)
    if problems:
        raise UserError(*problems)
    for note in notes:
        console.print(f"[yellow]{escape(note)}[/]")
    recipe = recipe_with(facts)
    loaded = examples.with_tokens(recipe, found.tokenizer)
    draft, read = request.draft.with_choices(choices.of_model(request, found.facts, facts, name)), {}
    for stage in request.stages:
        with bar(console, f"reading the rows of {stage.name}", None):
            read[stage.name] = rows.look_at(recipe, stage, loaded)
        draft = draft.with_choices(choices.of_rows(draft, stage, read[stage.name], card is not None))
    draft = _fitted(draft.with_choices(choices.prompts(read)), request, read, card, machine.ram_gib)
    _put(draft.file, draft.text(choices.header(request, read)))
    recipe = load(str(draft.file))
    return recipe, [plan_stage(recipe, stage.name, card, machine.ram_gib) for stage in request.stages]


def _fitted(
    draft: Draft, request: Request, read: dict[str, RowFacts], card: cards.Card | None, ram_gib: float
) -> Draft:
    """With rows as long as fit, where the whole ones do not."""
    for stage in request.stages:
        plan = plan_stage(draft.recipe(), stage.name, card, ram_gib)
        if not plan.fits and plan.largest_max_length >= choices.ROUND:
            draft = draft.with_choices(choices.fitting(stage, plan.largest_max_length, read[stage.name]))
    return draft


def _put(file: Path, text: str) -> None:
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; name another with --out") from None
