"""The section of the stage that learns from rewards: what a completion is worth, and how it is learnt from."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from toolkit.recipe.fields import Section, on_machine, shapes_rows, shapes_weights
from toolkit.recipe.sections import (
    Architecture,
    Int,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RegularExpression,
    Texts,
)
from toolkit.recipe.stage_sections import StageSection

ANSWER = "{answer}"  # where a pattern of `matches` holds the row's answer
TRUNCATED = "truncated"  # the reward of a completion that was cut, as logs call it
Kind = Literal["function", "model", "ends", "length", "contains", "matches", "json"]
KINDS: tuple[str, ...] = get_args(Kind)


class RewardTerm(Section):
    """One reward of a completion: what gives it, and its weight in the sum."""

    name: Annotated[str | None, shapes_weights("what logs and reports call it", "its kind")] = None
    weight: Annotated[float, shapes_weights("factor in the sum of rewards", "as it is given")] = 1.0
    function: Annotated[
        str | None,
        shapes_weights(
            "FILE.py:NAME, a function of your own, called as TRL calls one: lists of prompts and completions in, a "
            "list of numbers out",
            "none",
        ),
    ] = None
    model: Annotated[
        str | None,
        shapes_weights(
            "a reward model: the name of a reward run, a folder, or a Hub id; it reads text, by its own tokenizer and "
            "template",
            "none",
        ),
    ] = None
    revision: Annotated[
        str | None, shapes_weights("commit, tag or branch of `model` on the Hub", "the repository's main")
    ] = None
    load_in_4bit: Annotated[
        bool,
        shapes_weights(
            "load `model` in 4-bit NF4; one of our runs is loaded as it was trained",
            "the only way to hold two models of 8B in 24 GB",
        ),
    ] = True
    architecture: Annotated[
        Architecture | None,
        on_machine("of `model`, from its config.json, for the plan", "as the recipe's own model"),
    ] = None
    ends: Annotated[bool | None, shapes_weights("1 where the completion came to an end", "none")] = None
    length: Annotated[
        PositiveInt | None,
        shapes_weights(
            "0 up to so many tokens, falling evenly to -1 at max_completion_length (Yu et al. 2025, equation 13)",
            "none",
        ),
    ] = None
    contains: Annotated[
        bool | None, shapes_weights("1 where the row's answer occurs as whole words", "none")
    ] = None
    matches: Annotated[
        RegularExpression | None,
        shapes_weights(
            "1 where this regular expression is found; {answer} in it stands for the row's answer", "none"
        ),
    ] = None
    json_keys: Annotated[
        Texts | None,
        Field(strict=False, alias="json"),
        shapes_weights("1 where the completion is one JSON value; an object with these keys, if any", "none"),
    ] = None

    model_config = StageSection.model_config | {"populate_by_name": True}

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if self._value(kind) is not None)

    @property
    def called(self) -> str:
        return self.name or self.kind

    @property
    def needs_answer(self) -> bool:
        return bool(self.contains or (self.matches and ANSWER in self.matches))

    def _value(self, kind: str) -> object:
        return getattr(self, "json_keys" if kind == "json" else kind)

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> RewardTerm:
        kinds = [kind for kind in KINDS if self._value(kind) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"a reward is one of {', '.join(KINDS)}; got {' and '.join(kinds) or 'none of them'}"
            )
        if self.ends is False or self.contains is False:
            raise ValueError(f"{kinds[0]}: false gives nothing; leave the reward out")
        if not self.weight:
            raise ValueError("weight 0 gives nothing; leave the reward out")
        if not self.model and (self.revision or self.architecture):
            raise ValueError("revision and architecture are those of a `model`")
        if self.function and not self.function.rpartition(".py:")[0]:
            raise ValueError("function is FILE.py:NAME, e.g. rewards.py:politeness")
        return self


class Rl(StageSection):
    """Learning from rewards: rows are prompts; the model answers, answers are scored, better ones become likelier."""

    learning_rate: Annotated[
        PositiveFloat, shapes_weights("peak of the schedule", "TRL's default for both algorithms")
    ] = 1e-6
    algorithm: Annotated[
        Literal["rloo", "grpo"],
        shapes_weights(
            "against what a completion is held: rloo the mean of the others of its prompt, with the KL in the reward; "
            "grpo the mean of all, divided by their spread, with the KL in the loss",
            "Ahmadian et al. 2024: REINFORCE does as well as PPO, with less to tune",
        ),
    ] = "rloo"
    rewards: Annotated[
        tuple[RewardTerm, ...],
        Field(min_length=1, strict=False),
        shapes_weights("what a completion is worth: their weighted sum"),
    ]
    truncated_reward: Annotated[
        float | None,
        shapes_weights(
            "the whole reward of a completion that was cut at max_completion_length; null: what the rewards say of it"
        ),
    ]
    num_generations: Annotated[
        Int, Field(ge=2), shapes_weights("completions of a prompt in a step", "TRL's default for GRPO")
    ] = 8
    max_completion_length: Annotated[
        PositiveInt,
        shapes_rows("tokens of a completion at most; a prompt has the rest of max_length", "TRL's default"),
    ] = 512
    temperature: Annotated[
        PositiveFloat, shapes_weights("of the draw", "1 samples the policy that is trained")
    ] = 1.0
    top_p: Annotated[
        float,
        Field(gt=0, le=1),
        shapes_weights("draw from the likeliest tokens that hold this share", "1 samples the policy itself"),
    ] = 1.0
    sampling_seed: Annotated[
        Int, Field(ge=0), shapes_weights("of the completions alone, a new draw every step", "ours")
    ] = 1
    beta: Annotated[
        NonNegativeFloat,
        shapes_weights(
            "how strongly the policy is held to where it started: weight of the KL, in nats; 0 drops it",
            "TRL's default for RLOO",
        ),
    ] = 0.05
    generation_rows: Annotated[
        PositiveInt | None,
        shapes_weights("completions that are generated at once", "all of a step: the fewest passes"),
    ] = None

    @property
    def rows_per_step(self) -> int:
        return self.effective_batch_size // self.num_generations

    @property
    def prompt_tokens(self) -> int:
        """That a prompt may have."""
        return self.max_length - self.max_completion_length

    @property
    def generated_at_once(self) -> int:
        return min(self.generation_rows or self.effective_batch_size, self.effective_batch_size)

    @model_validator(mode="after")
    def _completions_fit(self) -> Rl:
        if self.prompt_tokens < 1:
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no room for a prompt in max_length "
                f"{self.max_length}"
            )
        if self.effective_batch_size % self.num_generations:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} counts completions and is not a multiple of "
                f"num_generations {self.num_generations}"
            )
        return self

    @model_validator(mode="after")
    def _rewards_are_told_apart(self) -> Rl:
        names = [reward.called for reward in self.rewards]
        if twice := sorted({name for name in names if names.count(name) > 1 or name == TRUNCATED}):
            raise ValueError(f"rewards: {', '.join(twice)} is taken: give it a `name` of its own")
        if self.truncated_reward is not None and any(reward.ends for reward in self.rewards):
            raise ValueError(
                "truncated_reward and a reward `ends` say the same: of one that was cut the first alone counts. "
                "Leave `ends` out, or set truncated_reward to null"
            )
        for reward in self.rewards:
            if reward.length and reward.length >= self.max_completion_length:
                raise ValueError(
                    f"rewards: a length of {reward.length} tokens is never passed: max_completion_length is "
                    f"{self.max_completion_length}"
                )
        return self
