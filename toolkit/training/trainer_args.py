"""Recipe -> keyword arguments of TRL's configs. Pure: one place, every field that matters, no defaults.

Unsloth's GPU trainers change TRL's defaults (adamw_8bit, weight decay 0.001, accumulation 2, seed 3407 ...), so
whatever shapes a run is passed explicitly and is the same on both backends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.memory.plan import Settings
from toolkit.recipe.schema import Dpo, Kto, Recipe, Reward, Rl, Sft, StageSection


def sft(recipe: Recipe, settings: Settings, output_dir: Path, stage: str = "sft") -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig`. Rows come tokenised and cut, so TRL prepares nothing."""
    section = recipe.section(stage)
    assert isinstance(section, Sft)
    return _common(recipe, stage, section, settings, output_dir) | {
        "packing": section.packing,
        "packing_strategy": "bfd",
        "eval_packing": False,
        "padding_free": False,
        "assistant_only_loss": False,  # our labels decide
        "completion_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "loss_type": "nll",
        "shuffle_dataset": False,
        "neftune_noise_alpha": None,
    }


def dpo(recipe: Recipe, settings: Settings, output_dir: Path, stage: str = "dpo") -> dict[str, Any]:
    """Keyword arguments of `trl.DPOConfig`. The reference log-probs are computed by engine/reference/."""
    section = recipe.section(stage)
    assert isinstance(section, Dpo)
    return _common(recipe, stage, section, settings, output_dir) | {
        "beta": section.beta,
        "label_smoothing": section.label_smoothing,
        "loss_type": [section.loss_type],
        "loss_weights": None,
        "discopop_tau": 0.05,  # as its paper found
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "disable_dropout": True,
        "padding_free": False,
        "precompute_ref_log_probs": False,
        "sync_ref_model": False,
    }


def reward(recipe: Recipe, settings: Settings, output_dir: Path, stage: str = "reward") -> dict[str, Any]:
    """Keyword arguments of `trl.RewardConfig`. Rows come tokenised and cut."""
    section = recipe.section(stage)
    assert isinstance(section, Reward)
    return _common(recipe, stage, section, settings, output_dir) | {
        "center_rewards_coefficient": section.center_rewards_coefficient,
        "disable_dropout": True,
        "activation_offloading": False,
        "pad_to_multiple_of": None,
    }


def kto(recipe: Recipe, settings: Settings, output_dir: Path, stage: str = "kto") -> dict[str, Any]:
    """Keyword arguments of `trl.KTOConfig`, but for the weights of the classes, which the rows decide. The reference
    log-probs are computed by engine/reference/.

    TRL takes the KL term over what it is handed at once. That are the rows of a step whatever fits into memory; how
    many of them run at once is decided in engine/train/pieces.py.
    """
    section = recipe.section(stage)
    assert isinstance(section, Kto)
    return _common(recipe, stage, section, settings, output_dir) | {
        "per_device_train_batch_size": section.effective_batch_size,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",  # a row's KL completion is that of its neighbour
        "loss_type": "kto",
        "beta": section.beta,
        "disable_dropout": True,
        "precompute_ref_log_probs": False,
        "sync_ref_model": False,
        "activation_offloading": False,
        "pad_to_multiple_of": None,
    }


def rl(recipe: Recipe, settings: Settings, output_dir: Path, stage: str = "rl") -> dict[str, Any]:
    """Keyword arguments of `trl.RLOOConfig` or `trl.GRPOConfig`, as the algorithm asks.

    Every field that shapes a run: Unsloth's own config changes several by itself (masking, the upper clip, the scale of
    rewards). The completions of a step are made at its start and used once: no ratio of policies is ever clipped.
    """
    section = recipe.section(stage)
    assert isinstance(section, Rl)
    common = _common(recipe, stage, section, settings, output_dir)
    del common["max_length"]  # held by the prompts' length and max_completion_length
    held_out = bool(section.eval_datasets or section.eval_rows)
    shared = {
        "remove_unused_columns": False,  # rewards read the others
        "eval_on_start": held_out,
        "metric_for_best_model": "reward" if section.eval_steps else None,
        "greater_is_better": True if section.eval_steps else None,
        "num_generations": section.num_generations,
        "num_generations_eval": 1,
        "max_completion_length": section.max_completion_length,
        "shuffle_dataset": not section.group_by_length,  # stage.py has grouped them
        "steps_per_generation": settings.gradient_accumulation_steps,
        "generation_batch_size": None,  # follows
        "num_iterations": 1,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": None,
        "chat_template_kwargs": None,
        "cache_implementation": None,
        "pad_to_multiple_of": None,
        "use_vllm": False,  # its pins exclude ours
        "use_transformers_continuous_batching": False,
        "beta": section.beta,
        "epsilon": 0.2,  # idle: see above
        "epsilon_high": 0.2,
        "reward_weights": [
            *(reward.weight for reward in section.rewards),
            *([] if section.truncated_reward is None else [1.0]),
        ],
        "mask_truncated_completions": False,  # truncated_reward says what they are worth
        "sync_ref_model": False,
        "disable_dropout": True,
        "model_init_kwargs": None,
        "router_aux_loss_coef": None,
        "log_completions": False,  # engine/train/completions.py keeps samples
    }
    return common | shared | (_RLOO if section.algorithm == "rloo" else _GRPO)


_RLOO: dict[str, Any] = {"normalize_advantages": False, "reward_clip_range": None}
_GRPO: dict[str, Any] = {
    "loss_type": "dapo",  # a mean over the tokens of the step: its pieces add up exactly
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "use_bias_correction_kl": False,
    "delta": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "cast_lm_head_to_fp32": False,
    "vllm_importance_sampling_correction": False,
}


def _common(
    recipe: Recipe, stage: str, section: StageSection, settings: Settings, output_dir: Path
) -> dict[str, Any]:
    evaluates = section.eval_steps is not None
    return {
        "output_dir": str(output_dir),
        "run_name": f"{recipe.name}-{stage}",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "max_length": section.max_length,
        "num_train_epochs": section.num_train_epochs,
        "max_steps": section.max_steps or -1,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "per_device_eval_batch_size": section.per_device_eval_batch_size,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler_type,
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": section.optim,
        "adam_beta1": 0.9,  # Adam paper, and the default of every library here
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "bf16": True,
        "fp16": False,
        "gradient_checkpointing": settings.recompute_layers > 0,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.recompute_layers > 0 else None,
        "logging_strategy": "steps",
        "logging_steps": section.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN loss must be seen
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": section.eval_steps,
        "prediction_loss_only": True,
        "metric_for_best_model": "loss"
        if evaluates
        else None,  # whose checkpoint is kept beside the last ones
        "greater_is_better": False if evaluates else None,
        "save_strategy": "steps",
        "save_steps": section.save_steps,
        "save_total_limit": section.save_total_limit,
        "report_to": list(section.report_to),  # engine/trackers.py says where they write
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential"
        if section.group_by_length
        else "random",  # stage.py has grouped them
        "dataloader_drop_last": False,
        "remove_unused_columns": True,
        "average_tokens_across_devices": False,
    }
