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


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto", "rl"])
def test_every_keyword_exists_in_the_pinned_config(stage: str) -> None:
    from trl import DPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

    configs = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig, "kto": KTOConfig, "rl": RLOOConfig}
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
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto", "rl"])
def test_a_recipe_value_arrives(stage: str, override: str, keyword: str, value: Any) -> None:
    if stage == "rl" and keyword == "max_length":
        return  # TRL has no such field there
    assert arguments(stage, override.format(stage))[keyword] == value


# Of the others' engine, of losses, entropy control and reference models that are switched off, of what is only shown.
IDLE = (
    *(
        "vllm_",
        "sapo_",
        "vespo_",
        "entropy_",
        "ref_model_",
        "transformers_",
        "use_transformers_paged",
        "ds3_",
    ),
    *("log_", "num_completions_to_print", "max_tool_calling_iterations", "trust_remote_code"),
)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_no_field_of_the_algorithm_is_left_to_a_default(algorithm: str) -> None:
    """Unsloth's own config has other defaults than TRL's."""
    import trl

    config = {"rloo": trl.RLOOConfig, "grpo": trl.GRPOConfig}[algorithm]
    fields = [name for name in config.__annotations__ if not name.startswith(("_", *IDLE))]
    found = arguments("rl", f"rl.algorithm={algorithm}")
    assert len(fields) > 20 and [name for name in fields if name not in found] == []
    assert found.keys() <= {field.name for field in dataclasses.fields(config)}
    assert (found["num_iterations"], found["steps_per_generation"]) == (
        1,
        found["gradient_accumulation_steps"],
    )


@pytest.mark.parametrize(
    ("override", "keyword", "value"),
    [
        ("rl.num_generations=4", "num_generations", 4),
        ("rl.max_completion_length=32", "max_completion_length", 32),
        ("rl.temperature=0.5", "temperature", 0.5),
        ("rl.top_p=0.9", "top_p", 0.9),
        ("rl.beta=0.25", "beta", 0.25),
        ("rl.group_by_length=false", "shuffle_dataset", True),
        ("rl.rewards.0.weight=3.0", "reward_weights", [3.0, 1.0]),
        ("rl.truncated_reward=null", "reward_weights", [1.0]),
    ],
)
def test_a_value_of_learning_from_rewards_arrives(override: str, keyword: str, value: Any) -> None:
    assert arguments("rl", override)[keyword] == value


def test_the_values_of_one_stage_only() -> None:
    assert arguments("dpo", "dpo.beta=0.3")["beta"] == 0.3
    robust = arguments("dpo", "dpo.loss_type=robust", "dpo.label_smoothing=0.1")
    assert (robust["loss_type"], robust["label_smoothing"]) == (["robust"], 0.1)
    assert arguments("sft", "sft.packing=true")["packing"] is True


def test_kto_is_handed_the_rows_of_a_whole_step_in_their_order() -> None:
    found = arguments("kto", "kto.effective_batch_size=12", "kto.group_by_length=false")
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (12, 1)
    assert found["train_sampling_strategy"] == "sequential"


def test_the_plan_decides_batch_and_checkpointing() -> None:
    found = arguments("sft")
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 4)
    assert found["gradient_checkpointing"] is True
