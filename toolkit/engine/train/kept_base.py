"""A base model that stays loaded from one run to the next, for runs that would load the very same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from peft import PeftModel

from toolkit.engine.base import model, oom
from toolkit.engine.shared_prompt import hooks
from toolkit.memory.plan import Settings
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import Task

UNSLOTHS = "_saved_temp_tokenizer"  # where Unsloth keeps the tokenizer, to turn its padding around


class KeptBase:
    """Loads as `model.load` does, `num_loads` times in all.

    A run leaves the weights of its base as they are: it trains a LoRA, which is taken off again, as are its hooks. What
    it may have set on tokenizer and configurations is put back. A model with a head for scores, or with trained rows of
    its embedding, is loaded anew each time: there a run replaces more than that.
    """

    def __init__(self) -> None:
        self.num_loads = 0
        self._key: object = None
        self._loaded: model.LoadedModel | None = None  # as a run has it, LoRA and all
        self._tokenizer: Any = None
        self._notes: list[str] = []
        self._configs: list[tuple[Any, dict[str, Any]]] = []

    def load(
        self, recipe: Recipe, max_length: int, settings: Settings | None = None, task: Task = "causal_lm"
    ) -> model.LoadedModel:
        recomputes = settings is not None and settings.recompute_layers > 0
        key = (task, recipe.model, recipe.template, recipe.lora, max_length, recomputes)
        if self._loaded is not None and key == self._key:
            self._loaded = self._as_loaded(self._loaded)
            return self._loaded
        self.forget()
        loaded = model.load(recipe, max_length, settings, task=task)
        self.num_loads += 1
        if task == "causal_lm" and not recipe.lora.trainable_tokens:
            self._key, self._loaded = key, loaded
            self._tokenizer, self._notes = copy.deepcopy(loaded.tokenizer), [*loaded.notes]
            configs = (loaded.model.config, loaded.model.generation_config)
            self._configs = [(config, copy.deepcopy(vars(config))) for config in configs]
        return loaded

    def forget(self) -> None:
        """Frees it; the next run loads."""
        self._key = self._loaded = self._tokenizer = None
        self._configs = []
        oom.free_memory()

    def _as_loaded(self, used: model.LoadedModel) -> model.LoadedModel:
        if sharing := hooks.installed(used.model):
            sharing.remove()
        base = used.model.unload() if isinstance(used.model, PeftModel) else used.model
        for config, values in self._configs:
            vars(config).clear()
            vars(config).update(copy.deepcopy(values))
        tokenizer = copy.deepcopy(self._tokenizer)
        for module in base.modules():
            if UNSLOTHS in vars(module):
                setattr(module, UNSLOTHS, tokenizer)
        oom.free_memory()
        return replace(used, model=base, tokenizer=tokenizer, notes=[*self._notes])
