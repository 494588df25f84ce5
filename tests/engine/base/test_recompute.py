"""Selective recomputation: exactly as many layers run twice as the settings say, and the gradients stay the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import run_stage, tiny
from toolkit.engine.base import model, recompute
from toolkit.engine.train import pieces
from toolkit.memory.plan import plan_stage

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def loaded() -> model.LoadedModel:
    recipe = tiny("memory.recompute_layers=all")
    settings = plan_stage(recipe, "sft", None, 16).settings
    loaded = model.load(recipe, 256, settings)
    model.attach_lora(loaded, recipe, settings, 256)
    loaded.model.train()
    return loaded


def forwards(policy: Any) -> tuple[Counter[int], list[Any]]:
    """How often each layer's forward runs, counted from now on; and the handles that count."""
    counts: Counter[int] = Counter()

    def count(index: int) -> Any:
        return lambda module, args, kwargs: counts.update([index])

    layers = recompute.layers(policy)
    return counts, [
        layer.self_attn.register_forward_pre_hook(count(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]


def backward(policy: Any) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    ids = torch.arange(40, 72).reshape(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        policy(input_ids=ids, labels=ids).loss.backward()
    return {
        name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("count", range(NUM_LAYERS + 1))
def test_so_many_layers_run_twice_and_the_gradients_are_those_of_none(
    loaded: model.LoadedModel, count: int
) -> None:
    recompute.recompute(loaded.model, 0)
    expected = backward(loaded.model)
    recompute.recompute(loaded.model, count)
    assert recompute.num_recomputing(loaded.model) == count
    counts, handles = forwards(loaded.model)
    gradients = backward(loaded.model)
    for handle in handles:
        handle.remove()
    assert [counts[index] for index in range(NUM_LAYERS)] == [2] * count + [1] * (NUM_LAYERS - count)
    assert gradients.keys() == expected.keys() and len(expected) > 0
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_everything_recomputes_only_in_its_block() -> None:
    recipe = tiny("memory.recompute_layers=none")
    settings = plan_stage(recipe, "sft", None, 16).settings
    bare = model.load(
        recipe, 256, settings
    )  # loaded without recomputation: no layer has its checkpoint function
    model.attach_lora(bare, recipe, settings, 256)
    bare.model.train()
    expected = backward(bare.model)
    with recompute.recomputing(bare.model, NUM_LAYERS):
        assert recompute.num_recomputing(bare.model) == NUM_LAYERS
        gradients = backward(bare.model)
    assert recompute.num_recomputing(bare.model) == 0
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "layers"), [("sft", 3), pytest.param("dpo", 1, marks=pytest.mark.long), ("dpo", 0)]
)
def test_a_run_recomputes_what_its_settings_say_to_the_last_step(
    stage: str, layers: int, runs_with_sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What resets the flags on the way: for_training, the Trainer, TRL's reference pass, evaluation."""
    seen = []
    training_step = pieces.OutOfMemoryRecovery.training_step

    def look(self, policy, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        seen.append([bool(layer.gradient_checkpointing) for layer in recompute.layers(policy)])
        return training_step(self, policy, inputs, num_items_in_batch)

    monkeypatch.setattr(pieces.OutOfMemoryRecovery, "training_step", look)
    runs = runs_with_sft if stage == "dpo" else tmp_path / "sft"
    few = ("dpo.max_rows=16", "dpo.eval_steps=1") if stage == "dpo" else ("sft.max_rows=32",)
    recipe = tiny(f"memory.recompute_layers={layers}", *few)
    done = run_stage(recipe, stage, runs)
    assert done.report["settings"]["recompute_layers"] == layers
    assert len(seen) == done.report["num_steps"] + 1, "the probe, then every step"
    assert all(flags == [True] * layers + [False] * (NUM_LAYERS - layers) for flags in seen)
