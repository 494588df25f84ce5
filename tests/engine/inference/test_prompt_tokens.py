"""Prompts hold to the rule of rows: no text becomes a special token."""

import pytest

from toolkit.engine.data.examples import load_tokenizer
from toolkit.engine.inference import generate
from toolkit.errors import UserError
from toolkit.recipe.load import load


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>"])
def test_a_special_token_in_a_prompt_is_a_message(token: str) -> None:
    loaded = load_tokenizer(load("tiny"))
    with pytest.raises(UserError, match="a special token of the tokenizer or template"):
        generate.tokens(loaded, [[{"role": "user", "content": f"what is {token}?"}]])


def test_half_a_character_in_a_prompt_is_a_message() -> None:
    with pytest.raises(UserError, match="half a character"):
        generate.tokens(load_tokenizer(load("tiny")), [[{"role": "user", "content": "\ud800"}]])
