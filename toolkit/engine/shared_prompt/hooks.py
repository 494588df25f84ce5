"""Two hooks on a model's decoder: a batch that carries its tree goes through it flat, and comes out padded as TRL's.

Shift, head, loss, metrics and logging stay TRL's. Without a tree the model is what it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from toolkit.engine.base import recompute
from toolkit.engine.base.micro_batches import pair_lengths
from toolkit.engine.shared_prompt import attention
from toolkit.engine.shared_prompt.tree import Tree, Uses, tree_of

TREE = "pair_tree"  # where a batch carries it; TRL hands keys that it does not know to the model
# transformers takes a 4-D mask as it is and makes none of its own; nobody reads this one.
UNREAD_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class TreeCollator:
    """TRL's collator of pairs, whose batch also carries its tree. No row may be longer than it would cut."""

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        batch[TREE] = tree_of([pair_lengths(row) for row in rows], batch["input_ids"].shape[1])
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["collator"], name)


class SharedPrompts:
    """A model that runs trees; `uses` counts what went through it so. `kernel` names its attention."""

    def __init__(self, model: Any, max_length: int):
        """Raises NotShared where rows of up to `max_length` tokens would not see what they should."""
        layer = recompute.layers(model)[0]
        names = _names_in_forward(getattr(layer, "self_attn", None))
        config = model.config.get_text_config()
        self._by_unsloth = "resolve_prefix_seg_info" in names
        if reason := _reason(config, names, max_length):
            raise NotShared(reason)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        has_varlen = attention.varlen_is_right(heads, kv_heads, head_dim)
        self.kernel = "varlen" if has_varlen else "segments"
        reach = attention.reach_unsloth if self._by_unsloth else attention.reach_transformers
        reach(attention.varlen if has_varlen else attention.segments)
        self.num_layers, self.uses = config.num_hidden_layers, Uses()
        self._tree: Tree | None = None
        self._decoder = _decoder(model)
        self._hooks = (
            self._decoder.register_forward_pre_hook(self._flatten, with_kwargs=True),
            self._decoder.register_forward_hook(self._pad, with_kwargs=True),
        )
        self._decoder.shared_prompts = self

    def remove(self) -> None:
        """The model runs no tree any more."""
        for hook in self._hooks:
            hook.remove()
        self._decoder.shared_prompts = None

    def _flatten(self, decoder: Any, args: Any, kwargs: Any) -> Any:
        self._tree = kwargs.pop(TREE, None)
        if self._tree is None:
            return args, kwargs
        ids = kwargs["input_ids"]
        self._tree = tree = replace(self._tree.to(ids.device), uses=self.uses)
        self.uses.passes += 1
        return args, kwargs | {
            "input_ids": ids.flatten()[tree.from_padded][None],
            "position_ids": tree.positions[None],
            "attention_mask": None if self._by_unsloth else UNREAD_MASK,
            attention.KEYWORD: tree,
        }

    def _pad(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if self._tree is not None:
            output.last_hidden_state = output.last_hidden_state[0][self._tree.to_padded]
            self._tree = None
        return output


class NotShared(Exception):
    """Why the prompts of a model's pairs are run twice."""


def installed(model: Any) -> SharedPrompts | None:
    """What `SharedPrompts` made of this model, if it did."""
    return getattr(_decoder(model), "shared_prompts", None)


def _decoder(model: Any) -> Any:
    """The decoder under the head, whatever adapters it has."""
    get_base = getattr(model, "get_base_model", None)
    return (get_base() if get_base else model).base_model


def _reason(config: Any, names: tuple[str, ...], max_length: int) -> str | None:
    if not {"resolve_prefix_seg_info", "ALL_ATTENTION_FUNCTIONS"} & set(names):
        return f"the attention of {config.model_type} has no place for it"
    if "resolve_prefix_seg_info" not in names and config._attn_implementation != "sdpa":
        return f"the attention is {config._attn_implementation}, not sdpa"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type} caps its attention's logits"
    if getattr(config, "attention_dropout", 0.0):
        return f"{config.model_type} drops attention weights in training"
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and window < max_length and "sliding_attention" in kinds:
        return f"rows of {max_length} tokens are longer than the window of {window} of {config.model_type}"
    return None


def _names_in_forward(module: Any) -> tuple[str, ...]:
    """What a module's forward looks up: tells whose it is, whoever replaced it."""
    code = getattr(inspect.unwrap(getattr(type(module), "forward", lambda: None)), "__code__", None)
    return code.co_names if code else ()
