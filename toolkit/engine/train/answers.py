"""The recipe's prompts, answered by what a stage started from and by what it made. Asked when the run is safe."""

from __future__ import annotations

import json
import time

from rich.markup import escape

from toolkit.console.screen import bar
from toolkit.data.prompts import as_messages
from toolkit.engine.base import model, oom
from toolkit.engine.inference import generate
from toolkit.errors import Interrupted
from toolkit.files import write_text
from toolkit.recipe.stages import BASE
from toolkit.records.run_report import Answers
from toolkit.redaction import blanked
from toolkit.run.rundir import ANSWERS
from toolkit.training.job import Job

BEFORE = "before"  # the name of the starting adapter beside the trained one, "default"


def compare(job: Job, loaded: model.LoadedModel) -> Answers:
    """Writes answers.jsonl: {prompt, before, after}, each answer {text, num_tokens, ended}.

    Greedy, so that a difference is the model's; in one batch, because they are only looked at. Returns what report.json
    says of it: whose answers those are, the seconds, or in `note` why there are none: whatever goes wrong here, the
    trained adapter is already saved.
    """
    started = time.perf_counter()
    note = None
    try:
        before, after = _both(job, loaded)
        rows = [
            {"prompt": prompt, "before": one.to_dict(), "after": other.to_dict()}
            for prompt, one, other in zip(job.recipe.compare.prompts, before, after, strict=True)
        ]
        lines = (json.dumps(blanked(row), ensure_ascii=False) + "\n" for row in rows)
        write_text(job.run.path / ANSWERS, "".join(lines))
    except (Interrupted, KeyboardInterrupt):
        note = "a signal asked the run to end"
    except Exception as error:
        note = str(error).partition("\n")[0] or type(error).__name__
    if note:
        job.console.print(f"[yellow]no answers before and after: {escape(note)}; the adapter is saved[/]")
        oom.free_memory()
    return Answers(
        before=job.start.name if job.start else BASE,
        after=job.run.name,
        note=note,
        seconds=time.perf_counter() - started,
    )


def _both(job: Job, loaded: model.LoadedModel) -> tuple[list[generate.Answer], list[generate.Answer]]:
    how = job.recipe.compare.model_copy(update={"do_sample": False, "mix_lengths": True})
    prompts = [as_messages(job.recipe, prompt) for prompt in how.prompts]
    if job.start:
        model.add_adapter(loaded, BEFORE, job.start.folder)
    found = []
    with bar(job.console, f"{job.run.name}: answers before and after", 2 * len(prompts)) as advance:
        for name in (BEFORE if job.start else BASE, "default"):
            with model.use_adapter(loaded.model, name):
                found.append(generate.answer(loaded, prompts, how, job.recipe.seed, advance))
    return found[0], found[1]
