"""Selective recomputation: some decoder layers run their forward again in backward, the others keep theirs.

Unsloth's `for_training`, TRL's reference pass and the Trainer itself turn the flags of all layers on or off, so
they are set when training begins and again before every step, which costs one attribute per layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


def layers(model: Any) -> list[Any]:
    """The decoder layers, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: Any, count: int) -> None:
    """Lets the first `count` decoder layers recompute; the rest keep their activations.

    The first ones, because backward comes to them last: by then the activations that the others kept are freed,
    so that recomputing needs no room beside them. Evenly spread, it would.
    """
    decoder = layers(model)
    assert 0 <= count <= len(decoder)
    if count and not hasattr(decoder[0], "_gradient_checkpointing_func"):
        arm(model)
    for index, layer in enumerate(decoder):
        layer.gradient_checkpointing = index < count


def arm(model: Any) -> None:
    """Gives every layer its checkpoint function (Unsloth's on a GPU), which a load without recomputation omits."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def recomputing(model: Any, count: int) -> Iterator[None]:
    """`count` layers recompute in the block; afterwards as many as before."""
    before = num_recomputing(model)
    recompute(model, count)
    try:
        yield
    finally:
        recompute(model, before)


def num_recomputing(model: Any) -> int:
    return sum(bool(layer.gradient_checkpointing) for layer in layers(model))


class Recompute(TrainerCallback):
    """Keeps `count` layers recomputing throughout training."""

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        recompute(model, self.count)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        recompute(model, self.count)
