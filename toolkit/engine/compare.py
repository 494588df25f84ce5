"""Base, SFT and DPO side by side: one base in memory, adapters switched on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from toolkit.engine import data, generate, log_probs, model
from toolkit.engine.progress import bar
from toolkit.errors import UserError
from toolkit.prompts import as_messages, is_correct, read_questions
from toolkit.recipe import Recipe
from toolkit.report import comparison_markdown, show_comparison
from toolkit.rundir import RunDir, write_json, write_text
from toolkit.runlog import LOG

ADAPTERS = ("sft", "dpo")


def run(recipe: Recipe, run: RunDir, prompts: list[str], console: Console) -> dict[str, Any]:
    """Answers the prompts with every model there is, measures each, writes the comparison. Returns the report.

    Raises UserError when no stage of the recipe has a finished adapter.
    """
    started = time.perf_counter()
    adapters = {name: run.of(name).adapter for name in ADAPTERS if run.of(name).finished_with() is not None}
    if not adapters:
        raise UserError(
            f"nothing to compare: no finished adapter in {run.of('sft').adapter} or {run.of('dpo').adapter}; "
            f"run `python run_sft.py --recipe {recipe.name}` and `python run_dpo.py --recipe {recipe.name}` first"
        )
    run.move_aside()
    LOG.open(run.log, console)
    questions = read_questions(recipe)
    stages = [section for section in (recipe.sft, recipe.dpo) if section]
    console.print(f"[dim]loading {recipe.model.path}[/]")
    loaded = model.load(recipe, max(section.max_length for section in stages))
    model.load_adapters(loaded, adapters)

    asked = [as_messages(recipe, prompt) for prompt in prompts]
    everything = asked + [question["messages"] for question in questions]
    models: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[generate.Answer]] = {}
    for name in ("base", *adapters):
        begun = time.perf_counter()
        with (
            bar(console, f"{name}: {len(everything)} answers", len(everything)) as advance,
            model.switched_to(loaded.model, name),
        ):
            answers[name] = generate.answer(loaded, everything, recipe.compare, recipe.seed, advance)
        measured = answers[name][len(asked) :] if questions else answers[name]
        models[name] = _measures(measured, questions) | {"generate_seconds": time.perf_counter() - begun}
    if "dpo" in adapters:
        models["dpo"]["preference_accuracy"] = _preference_accuracy(recipe, loaded, adapters, console)

    rows = [
        {"prompt": prompt, "answers": {name: answers[name][index].text for name in models}}
        for index, prompt in enumerate(prompts)
    ]
    report = {
        "recipe": recipe.name,
        "device": model.device_name(),
        "num_prompts": len(prompts),
        "num_questions": len(questions),
        "wall_seconds": time.perf_counter() - started,
        "models": models,
    }
    write_text(
        run.path / "comparison.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    write_text(run.path / "comparison.md", comparison_markdown(recipe, rows, models))
    write_json(run.report, report)
    show_comparison(rows, models, console)
    return report


def _measures(answers: list[generate.Answer], questions: list[dict[str, Any]]) -> dict[str, Any]:
    correct = [
        is_correct(answer.text, question) for answer, question in zip(answers, questions, strict=False)
    ]
    return {
        "correct_fraction": sum(correct) / len(correct) if correct else None,
        "ended_fraction": sum(answer.ended for answer in answers) / len(answers),
        "mean_answer_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
    }


def _preference_accuracy(
    recipe: Recipe, loaded: model.Loaded, adapters: dict[str, Path], console: Console
) -> float | None:
    """Share of held-out pairs whose implicit reward against the reference prefers the chosen reply."""
    rows = data.held_out_pairs(recipe, loaded)
    if not rows:
        return None
    margins = {}
    for name in ("dpo", "sft" if "sft" in adapters else "base"):
        with (
            bar(console, f"{name}: log-probs of {len(rows)} held-out pairs", 2 * len(rows)) as advance,
            model.switched_to(loaded.model, name),
        ):
            chosen, rejected = log_probs.pairs(loaded.model, rows, loaded.tokenizer.pad_token_id, advance)
        margins[name] = chosen - rejected
    policy, reference = margins.values()
    return torch.gt(policy, reference).float().mean().item()
