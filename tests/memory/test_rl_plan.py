"""The plan of learning from rewards: a policy and a reward model of 8B on one card of 24 GB."""

import pytest

from toolkit.cards import card
from toolkit.memory.plan import Plan, plan_stage
from toolkit.recipe.load import load


def planned(gib: str, *overrides: str) -> Plan:
    return plan_stage(load("llama31_8b", overrides), "rl", card(gib), 64.0)


def test_two_models_of_8b_in_4_bits_fit_24_gb() -> None:
    plan = planned("24")
    assert plan.fits and plan.items_gib["reward_models"] == pytest.approx(4.33, abs=0.01)
    assert {"generation", "scoring", "loss", "layer"} <= plan.phases_gib.keys()
    # 131,072 bytes of keys and values a token
    assert plan.phases_gib["generation"] > 10 + 32 * 1024 * 131_072 / 2**30
    settings = plan.settings
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 64


def test_what_generation_holds_follows_its_settings() -> None:
    plan, fewer = planned("24"), planned("24", "rl.generation_rows=8")
    assert plan.phases_gib["generation"] - fewer.phases_gib["generation"] > 24 * 1024 * 131_072 / 2**30
    without = planned("24", "rl.beta=0.0")
    assert plan.phases_gib["generation"] > without.phases_gib["generation"], "no copy of the adapter"
    rules = planned("24", "rl.rewards=[{contains: true}]")
    assert rules.items_gib["reward_models"] == 0 and "scoring" not in rules.phases_gib


def test_what_does_not_fit_is_refused_with_what_would_mend_it() -> None:
    said = planned("16").problem("llama31_8b") or ""
    assert "rl of llama31_8b does not fit" in said and "--set rl.generation_rows=16" in said
    assert "rl.rewards.0.load_in_4bit=true" in (
        planned("24", "rl.rewards.0.load_in_4bit=false").problem("x") or ""
    )


def test_a_micro_batch_is_whole_completions() -> None:
    assert planned("24").settings.tokens_per_micro_batch is None
    pinned = planned("24", "memory.tokens_per_micro_batch=2048").settings
    assert (pinned.per_device_train_batch_size, pinned.tokens_per_micro_batch) == (2, None)
