"""Each value of the recipe reaches the trainer under the trainer's own name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from toolkit.memory.plan import Settings
from toolkit.recipe.load import load
from toolkit.training import trainer_args

SETTINGS = Settings(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, recompute_layers=1, loss_chunk_gib=1.0
)


def arguments(stage: str, *overrides: str) -> dict[str, Any]:
    return getattr(trainer_args, stage)(load("tiny", overrides), SETTINGS, Path("out"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_every_keyword_exists_in_the_pinned_config(stage: str) -> None:
    from trl import DPOConfig, RewardConfig, SFTConfig

    configs = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}
    known = {field.name for field in dataclasses.fields(configs[stage])}
    assert arguments(stage).keys() <= known


@pytest.mark.parametrize(
    ("override", "keyword", "value"),
    [
        ("{}.learning_rate=0.5", "learning_rate", 0.5),
        ("{}.max_length=77", "max_length", 77),
        ("{}.max_steps=9", "max_steps", 9),
        ("{}.num_train_epochs=2.5", "num_train_epochs", 2.5),
        ("{}.lr_scheduler_type=constant", "lr_scheduler_type", "constant"),
        ("{}.warmup_steps=0.25", "warmup_steps", 0.25),
        ("{}.weight_decay=0.125", "weight_decay", 0.125),
        ("{}.max_grad_norm=0.75", "max_grad_norm", 0.75),
        ("{}.optim=paged_adamw_8bit", "optim", "paged_adamw_8bit"),
        ("{}.logging_steps=3", "logging_steps", 3),
        ("{}.eval_steps=11", "eval_steps", 11),
        ("{}.save_steps=13", "save_steps", 13),
        ("{}.save_total_limit=5", "save_total_limit", 5),
        ("{}.per_device_eval_batch_size=6", "per_device_eval_batch_size", 6),
        ("seed=5", "seed", 5),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_a_recipe_value_arrives(stage: str, override: str, keyword: str, value: Any) -> None:
    assert arguments(stage, override.format(stage))[keyword] == value


def test_the_values_of_one_stage_only() -> None:
    assert arguments("dpo", "dpo.beta=0.3")["beta"] == 0.3
    robust = arguments("dpo", "dpo.loss_type=robust", "dpo.label_smoothing=0.1")
    assert (robust["loss_type"], robust["label_smoothing"]) == (["robust"], 0.1)
    assert arguments("sft", "sft.packing=true")["packing"] is True


def test_the_plan_decides_batch_and_checkpointing() -> None:
    found = arguments("sft")
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 4)
    assert found["gradient_checkpointing"] is True
