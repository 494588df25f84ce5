"""The rows of embedding and head that `lora.trainable_tokens` names: PEFT trains them beside the LoRA.

PEFT puts the rows into a copy of the whole matrix in every pass. Unsloth's path for GPUs freezes whatever is no LoRA
matrix when it prepares a model (unsloth_zoo/training_utils.py, prepare_model_for_training), without a word: there such
a recipe is refused before torch is loaded (toolkit/process.py).
"""

from __future__ import annotations

from typing import Any

from toolkit.engine.base import tokens
from toolkit.recipe.schema import Recipe

ROWS = "trainable_tokens_delta"  # PEFT's name for them, before the adapter's


def indices(recipe: Recipe, model: Any, tokenizer: Any) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: the same tokens of both matrices, or of the one where they are tied."""
    if not recipe.lora.trainable_tokens:
        return None
    ids = sorted(set(tokenizer.convert_tokens_to_ids(list(recipe.lora.trainable_tokens))))
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.tie_word_embeddings:
        matrices.pop()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(matrix)]: ids for matrix in matrices}


def begin(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Rows that the base does not know begin at the mean of their matrix, as Unsloth has it where whole matrices are
    trained (unsloth_zoo/tokenizer_utils.py): the norm behind a row of zeros would make a huge gradient of it."""
    names = list(recipe.lora.trainable_tokens)
    if not names:
        return
    head = model.get_output_embeddings()
    head.bias = head.token_adapter.get_base_layer().bias  # TRL's fused log-probs ask the head itself for it
    unknown = {row.token: row for row in tokens.rows_of(model, tokenizer, names)}
    sides = ((model.get_input_embeddings(), "is_zero"), (model.get_output_embeddings(), "is_repeated"))
    for module, fault in sides:
        layer = module.token_adapter
        [(adapter, ids)] = layer.token_indices.items()
        mean = layer.get_base_layer().weight.detach().float().mean(0)
        for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
            if getattr(unknown[token], fault):
                layer.trainable_tokens_delta[adapter].data[place] = mean


def copy(model: Any, source: str, target: str) -> None:
    """Gives an adapter the rows of another. TRL's copy for the reference leaves them out (trl/trainer/dpo_trainer.py:
    it looks for ".default." in names, and theirs end with ".default"): they would be those of the base, in its dtype.
    """
    for name, rows in model.named_modules():
        if name.endswith(ROWS):
            rows[target].data = rows[source].detach().clone()
