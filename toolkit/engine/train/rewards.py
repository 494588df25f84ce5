"""The rewards of a recipe as TRL calls them: rules, functions of the user's own, reward models."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from toolkit.console.screen import bar
from toolkit.engine.base import fingerprint, oom
from toolkit.engine.inference import reward_model
from toolkit.errors import UserError
from toolkit.files import digest
from toolkit.recipe.rl_section import TRUNCATED, RewardTerm, Rl
from toolkit.rewards.rules import Completion, rule
from toolkit.rewards.user_function import UserFunction
from toolkit.run.rundir import WEIGHTS
from toolkit.training import reward_sources
from toolkit.training.job import Job

Scores = Sequence[float | None]


@dataclass
class RewardFunction:
    """One reward, called by TRL with all completions of a step. Where it has none for one, that is None.

    With `only_ended` it says nothing of a completion that was cut: another reward says all of it.
    """

    name: str
    score: Callable[[list[Completion], dict[str, Any]], Scores]
    ends: frozenset[int]
    only_ended: bool

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, **given: Any) -> list[float | None]:
        found = completions_of(given, self.ends)
        scored = [at for at, one in enumerate(found) if one.ended or not self.only_ended]
        scores: list[float | None] = [None] * len(found)
        if scored:
            of_these = {
                name: [column[at] for at in scored]
                for name, column in given.items()
                if isinstance(column, list) and len(column) == len(found)
            }
            for at, score in zip(scored, self.score([found[at] for at in scored], of_these), strict=True):
                scores[at] = score
        return scores


def completions_of(given: dict[str, Any], ends: frozenset[int]) -> list[Completion]:
    """What TRL hands to a reward function, completion by completion."""
    columns = given["prompts"], given["completions"], given["completion_ids"], given["answers"]
    return [
        Completion(prompt, completion[0]["content"].strip(), tuple(ids), ids[-1] in ends, tuple(answers))
        for prompt, completion, ids, answers in zip(*columns, strict=True)
    ]


def build(job: Job, ends: frozenset[int], recovery: oom.Recovery) -> list[RewardFunction]:
    """One for each of the recipe's rewards, and the one of completions that were cut. The run holds to their files.

    Raises UserError for a function or a model that cannot be loaded.
    """
    section = job.section
    assert isinstance(section, Rl)
    only_ended = section.truncated_reward is not None
    made = []
    for reward in section.rewards:
        made.append(RewardFunction(reward.called, _score(job, section, reward, recovery), ends, only_ended))
    if section.truncated_reward is not None:
        worth = section.truncated_reward

        def of_cut(completions: list[Completion], given: dict[str, Any]) -> Scores:
            return [None if one.ended else worth for one in completions]

        made.append(RewardFunction(TRUNCATED, of_cut, ends, only_ended=False))
    return made


def _score(
    job: Job, section: Rl, reward: RewardTerm, recovery: oom.Recovery
) -> Callable[[list[Completion], dict[str, Any]], Scores]:
    if reward.model:
        return _of_model(job, reward, recovery)
    if reward.function:
        return _of_user(job, reward)
    of_one = rule(reward, section)
    assert of_one is not None, "every other kind is a rule"
    return lambda completions, given: [of_one(completion) for completion in completions]


def _of_user(job: Job, reward: RewardTerm) -> Callable[[list[Completion], dict[str, Any]], Scores]:
    function = UserFunction.of(job.recipe, reward.function or "")
    job.run.hold_to({f"rewards.{reward.called}.file": digest(function.file)})
    call = function.load()

    def score(completions: list[Completion], given: dict[str, Any]) -> Scores:
        answer = [one.answers[0] if one.answers else None for one in completions]
        try:
            scores = call(**given, answer=answer)
        except Exception as error:
            line = next(
                (frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__))
                 if Path(frame.filename) == function.file), None,
            )  # fmt: skip
            raise UserError(
                f"reward function {function.written} failed in line {line}: {error!r}. Once it is mended the run is "
                "another one: start again with --fresh, or under a --name"
            ) from error
        return function.checked(scores, len(completions))

    return score


def _of_model(
    job: Job, reward: RewardTerm, recovery: oom.Recovery
) -> Callable[[list[Completion], dict[str, Any]], Scores]:
    path = reward_sources.model_path(job.recipe, job.run, reward)
    with bar(job.console, f"loading the reward model {path}", None):
        in_4bit = None if _adapter(path) else reward.load_in_4bit  # one of ours as it was trained
        loaded = reward_model.load(path, reward.revision, in_4bit)
    _check_architecture(job, reward, loaded)
    job.run.hold_to({f"rewards.{reward.called}.files": _identity(path, reward)})
    job.console.print(f"[dim]reward model {escape(path)}: scores text by its own tokenizer and template[/]")
    at_once = job.plan.settings.tokens_at_once(
        job.plan.settings.per_device_train_batch_size, job.section.max_length
    )

    def score(completions: list[Completion], given: dict[str, Any]) -> Scores:
        chats = [[*one.prompt, {"role": "assistant", "content": one.text}] for one in completions]
        scores: list[float] = loaded.score(chats, recovery=recovery, batch_tokens=at_once).tolist()
        return scores

    return score


def _identity(path: str, reward: RewardTerm) -> str:
    """One short name for what the scores are made by."""
    if adapter := _adapter(path):
        return digest(adapter)
    return fingerprint.combined(fingerprint.base_model(path, reward.revision)["files"])


def _adapter(path: str) -> Path | None:
    """The weights of an adapter that is there, or in a run's folder."""
    files = (Path(path) / "adapter" / WEIGHTS, Path(path) / WEIGHTS)
    return next((file for file in files if file.is_file()), None)


def _check_architecture(job: Job, reward: RewardTerm, loaded: reward_model.RewardModel) -> None:
    """Raises UserError where the model is not of the size that was planned for."""
    expected = reward.architecture or job.recipe.model.architecture
    config = loaded.model.config.get_text_config()
    wrong = [
        f"{key} {getattr(config, key, None)}, planned {value}"
        for key, value in expected.model_dump(exclude_none=True).items()
        if key != "max_position_embeddings" and getattr(config, key, None) != value
    ]
    if wrong:
        raise UserError(
            f"the reward model {loaded.path} is not of the size that the plan counts: {'; '.join(wrong)}. Write its "
            "numbers into the reward's `architecture`"
        )
