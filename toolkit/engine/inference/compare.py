"""Models side by side: one base in memory, adapters switched on it; answers, measures, and the files they go to."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.compare import answer_measures, candidates, view
from toolkit.compare.page import page
from toolkit.console.screen import bar, is_live
from toolkit.data.prompts import accepted, is_correct, last_turn, read_questions
from toolkit.data.turns import Messages
from toolkit.engine.base import model
from toolkit.engine.inference import generate, rewards
from toolkit.files import finite, write_text
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import BASE
from toolkit.records.comparison_report import AnswerMeasures, Comparison
from toolkit.redaction import blanked
from toolkit.run.replacing import replacing
from toolkit.run.rundir import RunDir

Folders = dict[str, Path | None]  # label of a model -> its adapter; None for the base
REFERENCE = (
    "_reference"  # the label of SFT's adapter where it is loaded but not compared; no model has such a one
)


def run(
    recipe: Recipe,
    run: RunDir,
    folders: Folders,
    prompts: list[Messages],
    console: Console,
    held_out: bool = True,
) -> Comparison:
    """Answers the prompts with every model, measures each, writes the comparison. Returns the report.

    With `held_out` it asks the recipe's questions too, and measures rewards on its held-out pairs. Raises UserError for
    adapters that cannot be loaded onto the base, and prompts that it cannot be given.
    """
    started = time.perf_counter()
    with replacing(run, console) as folder:
        questions = read_questions(recipe) if held_out else []
        reference = _reference(recipe, run, folders)
        with bar(console, f"loading {recipe.model.path}", None):
            loaded = model.load_trained(recipe, folders | reference)
        answers, seconds = _answer(recipe, loaded, folders, prompts, questions, console)
        asked = prompts + [question["messages"] for question in questions]
        models = {
            name: _measures(recipe, asked, answers[name], questions, seconds[name], folders[name])
            for name in folders
        }
        _say_what_is_unmeasured(models, console)
        for label in reference:
            measured = rewards.measure(recipe, loaded, label, asked, answers, console, held_out)
            models = {name: replace(models[name], **measured.get(name, {})) for name in models}
        how = recipe.compare.model_dump(mode="json", exclude={"prompts"})
        report = Comparison(
            recipe=recipe.name,
            device=model.device_name(),
            num_prompts=len(prompts),
            num_questions=len(questions),
            reference=next((str(folder or BASE) for folder in reference.values()), None),
            compare=how | {"seed": recipe.seed},
            wall_seconds=time.perf_counter() - started,
            models=models,
        )
        rows = [_row(prompt, index, answers) for index, prompt in enumerate(prompts)]
        answered = [
            _question(question, len(prompts) + index, answers) for index, question in enumerate(questions)
        ]
        _write(recipe, folder, rows + answered, models)
        report.write(folder / run.report.name)
    if not is_live(console):  # there they were shown as they came
        view.show_answers(rows, list(folders), console)
    view.show_measures(models, console)
    return report


def _reference(recipe: Recipe, run: RunDir, folders: Folders) -> Folders:
    """What rewards are measured against, under the label it is loaded by; {} without one."""
    found = candidates.reference(recipe, run, folders)
    if found is None:
        return {}
    for label, folder in folders.items():
        is_same = folder and found.folder and folder.samefile(found.folder)
        if is_same or (folder is None and found.folder is None):
            return {label: folder}
    return {BASE if found.folder is None else REFERENCE: found.folder}


# Answers ---------------------------------------------------------------------------------------------------


def _answer(
    recipe: Recipe,
    loaded: model.LoadedModel,
    folders: Folders,
    prompts: list[Messages],
    questions: list[dict[str, Any]],
    console: Console,
) -> tuple[dict[str, list[generate.Answer]], dict[str, float]]:
    """Every model's answers to the prompts and then to the questions, and the seconds they took it."""
    how, seconds = recipe.compare, dict.fromkeys(folders, 0.0)
    found: dict[str, dict[int, generate.Answer]] = {name: {} for name in folders}
    shown = 0
    lengths = [len(ids) for ids in generate.encode(loaded, prompts, how)]
    for indices in generate.batches(lengths, how, loaded.batch_tokens):
        batch = [prompts[index] for index in sorted(indices)]
        with view.streaming(batch, list(folders), console) as hear:
            for name in folders:
                begun = time.perf_counter()
                with model.use_adapter(loaded.model, name):
                    answers = generate.answer(loaded, batch, how, recipe.seed, on_step=partial(hear, name))
                seconds[name] += time.perf_counter() - begun
                found[name].update(zip(sorted(indices), answers, strict=True))
        begin = shown
        while shown < len(prompts) and all(shown in of_model for of_model in found.values()):
            shown += 1  # in the order of the prompts, whichever was answered first
        if is_live(console):
            rows = [_row(prompts[index], index, found) for index in range(begin, shown)]
            view.show_answers(rows, list(folders), console)
    all_answers = {name: [found[name][index] for index in range(len(prompts))] for name in folders}
    asked = [question["messages"] for question in questions]
    for name in folders if asked else ():
        begun = time.perf_counter()
        with (
            bar(console, f"{name}: {len(asked)} questions", len(asked)) as advance,
            model.use_adapter(loaded.model, name),
        ):
            all_answers[name] += generate.answer(loaded, asked, how, recipe.seed, advance)
        seconds[name] += time.perf_counter() - begun
    return all_answers, seconds


def _row(prompt: Messages, index: int, answers: Any) -> view.Row:
    return {
        "prompt": last_turn(prompt),
        "messages": prompt,
        "answers": {name: of_model[index].text for name, of_model in answers.items()},
        "measured": {
            name: {
                "num_tokens": of_model[index].num_tokens,
                "ended": of_model[index].ended,
                "seconds": of_model[index].seconds,
            }
            for name, of_model in answers.items()
        },
    }


def _question(question: dict[str, Any], index: int, answers: Any) -> view.Row:
    row = _row(question["messages"], index, answers)
    for name, measured in row["measured"].items():
        measured["correct"] = is_correct(row["answers"][name], question)
    return row | {"expected": accepted(question)}


# Measures --------------------------------------------------------------------------------------------------


def _measures(
    recipe: Recipe,
    asked: Sequence[Messages],
    answers: list[generate.Answer],
    questions: list[dict[str, Any]],
    seconds: float,
    folder: Path | None,
) -> AnswerMeasures:
    """Over all answers, but the correct ones: over those to the questions, which stand last."""
    num_tokens = [answer.num_tokens for answer in answers]
    to_questions = answers[len(answers) - len(questions) :]
    correct = [is_correct(a.text, question) for a, question in zip(to_questions, questions, strict=True)]
    return AnswerMeasures(
        adapter=None if folder is None else str(folder),
        num_answers=len(answers),
        correct_fraction=sum(correct) / len(correct) if correct else None,
        matches=answer_measures.matches(recipe.compare.measures, [answer.text for answer in answers]),
        ended_fraction=sum(answer.ended for answer in answers) / len(answers),
        **answer_measures.measures(
            [last_turn(prompt) for prompt in asked], [answer.text for answer in answers], num_tokens
        ),
        generate_seconds=seconds,
        tokens_per_second=sum(num_tokens) / seconds,
    )


def _say_what_is_unmeasured(models: dict[str, AnswerMeasures], console: Console) -> None:
    for name, measured in models.items():
        for own in (own for own, share in (measured.matches or {}).items() if share is None):
            console.print(
                f"[yellow]compare.measures.{own} is not measured for {name}:[/] its regular expression takes more than "
                f"{answer_measures.LONGEST_SEARCH_SECONDS:.0f} s over the answers; write it without a quantifier "
                "inside a quantifier"
            )


# Files -----------------------------------------------------------------------------------------------------


def _write(recipe: Recipe, folder: Path, rows: list[view.Row], models: dict[str, AnswerMeasures]) -> None:
    rows = blanked(rows)
    lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows]
    write_text(folder / "comparison.jsonl", "".join(lines))
    write_text(folder / "comparison.md", view.comparison_markdown(recipe, rows, models))
    write_text(folder / "comparison.html", page(recipe, rows, models))
