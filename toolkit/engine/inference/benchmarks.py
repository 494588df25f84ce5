"""Benchmarks of EleutherAI's lm-evaluation-harness on the model that is already loaded, with its own task files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from unsloth import FastLanguageModel

from toolkit.engine.base import oom
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.engine.base.model import LoadedModel
from toolkit.engine.base.quiet import quiet
from toolkit.errors import UserError
from toolkit.evaluation.scope import Tasks
from toolkit.recipe.schema import Recipe
from toolkit.records.evaluation_report import TaskMeasure

TaskMeasures = dict[str, dict[str, TaskMeasure]]  # by task and metric
MAX_BATCH_SIZE = 64  # tried first; the harness halves it until its longest row fits
SHOTS_SEED = 1234  # the harness's own, so that few-shot examples are those of published numbers


@dataclass
class Suite:
    """Tasks that were found and whose rows are here. `notes` says what was cut."""

    asked: Tasks
    found: Any
    notes: list[str] = field(default_factory=list)

    def run(self, recipe: Recipe, loaded: LoadedModel, name: str) -> tuple[TaskMeasures, bool]:
        """The metrics of each task of the model as it is switched now, and whether its chat template was used.

        Raises UserError where the memory does not hold a single row.
        """
        FastLanguageModel.for_inference(loaded.model)
        chat = self.asked.chat_template and speaks_template(recipe, name)
        for task in self.found["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SHOTS_SEED)  # again for each model: all see the same examples
        harness = harness_model(loaded)
        result = oom.attempt(lambda: self._evaluate(harness, chat))
        if isinstance(result, oom.OutOfMemory):
            raise UserError(f"out of memory ({name}, {', '.join(self.asked.names)}): {oom.fixes()}")
        if harness.num_cut:
            self.notes.append(
                f"{name}: {harness.num_cut:,} inputs of {', '.join(self.asked.names)} were cut from the left to the "
                f"{harness.max_length:,} tokens that the model takes"
            )
        return _measures(result), chat

    def _evaluate(self, harness: Harness, chat: bool) -> dict[str, Any]:
        with quiet():
            return evaluate(  # type: ignore[no-any-return]
                harness,
                self.found,
                limit=self.asked.limit,
                log_samples=False,
                bootstrap_iters=1000,  # only for metrics whose error has no formula
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )


def load(asked: Tasks) -> Suite:
    """Finds the tasks and fetches their rows. Raises UserError for unknown names and rows that cannot be had."""
    manager = _manager(asked)
    unknown = [name for name in asked.names if name not in manager.task_index]
    if unknown:
        raise UserError(*(_unknown(name, manager, asked.path) for name in unknown))
    with quiet():
        try:
            found = manager.load(list(asked.names))
        except (
            Exception
        ) as error:  # a task file is somebody's program: whatever is wrong in it, it is not ours
            raise UserError(_not_loaded(error, asked)) from error
    refused = [name for name, task in found["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if refused:
        raise UserError(
            f"--tasks {', '.join(refused)}: runs code that the model writes, which is not done here; run it with "
            "lm_eval itself, in a container, on the exported model"
        )
    return Suite(asked, found)


def speaks_template(recipe: Recipe, name: str) -> bool:
    """Whether a model was trained on the chat template: a tuned one was, a base where it ships the template itself."""
    return name != "base" or recipe.template.file == "tokenizer"


class Harness(HFLM):
    """The harness's model. It cuts what is longer than `max_length` from the left and says so once; here it counts."""

    num_cut = 0

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        most = self.max_length + 1  # the last token is predicted only
        self.num_cut += sum(len(before) + len(after) > most for _, before, after in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def tok_batch_encode(
        self, strings: Any, *arguments: Any, left_truncate_len: int | None = None, **options: Any
    ) -> Any:
        if left_truncate_len:
            self.num_cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, *arguments, left_truncate_len=left_truncate_len, **options)


def harness_model(loaded: LoadedModel) -> Harness:
    """The loaded model as the harness sees it. Log-probs are taken in fp32; its own default is the model's bf16."""
    return Harness(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size="auto",
        max_batch_size=MAX_BATCH_SIZE,
        max_length=loaded.max_length,
        softmax_dtype="float32",
    )


def _measures(result: dict[str, Any]) -> TaskMeasures:
    """The harness's flat "metric,filter" and "metric_stderr,filter" as a tree."""
    tasks: TaskMeasures = {}
    for task, found in result["results"].items():
        num_rows = result["n-samples"].get(task, {}).get("effective")
        for key, value in found.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = found.get(f"{metric}_stderr,{which}")
            measure = TaskMeasure(value, stderr if isinstance(stderr, float) else None, num_rows)
            tasks.setdefault(task, {})[metric if which == "none" else f"{metric}/{which}"] = measure
    return tasks


def _manager(asked: Tasks) -> Any:
    """Knows the user's own tasks; the harness's 14,000 files, seconds of reading, only where those are not enough."""
    with quiet():
        if asked.path:
            manager = TaskManager(include_path=asked.path, include_defaults=False)
            if set(asked.names) <= manager.task_index.keys():
                return manager
        return TaskManager(include_path=asked.path)


def _unknown(name: str, manager: Any, path: str | None) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
    where = (
        f" A task of your own needs a .yaml with `task: {name}` under {path}, free of errors." if path else ""
    )
    return f"--tasks {name!r}: lm-evaluation-harness knows no such task; {hint}{where}"


def _not_loaded(error: Exception, asked: Tasks) -> str:
    names = ", ".join(asked.names)
    if isinstance(error, (ConnectionError, *HUB_ERRORS)) and not isinstance(error, FileNotFoundError):
        return explain(error, "benchmark", names)
    return f"--tasks {names}: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
