"""A reward model in use: ours by the folder of its run, of its adapter or of an export, or any from the Hub.

A conversation is text here, never ids: it becomes tokens by the reward model's own tokenizer and template, which need
not be those of the model that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from toolkit.data.turns import Messages
from toolkit.engine.base import oom, score_head
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.engine.base.quiet import quiet
from toolkit.engine.inference import scores
from toolkit.errors import UserError
from toolkit.records.marks import AdapterMark
from toolkit.run import sealing
from toolkit.run.sealing import MARK

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class RewardModel:
    """Loaded, ready to score. `max_length` is the longest conversation that it takes, in its own tokens."""

    path: str
    model: Any
    tokenizer: Any
    max_length: int

    def score(
        self,
        conversations: Sequence[Messages],
        advance: Callable[[int], None] = lambda count: None,
        recovery: oom.Recovery | None = None,
        batch_tokens: int = scores.BATCH_TOKENS,
    ) -> torch.Tensor:
        """A score for each, larger for what it prefers: (len(conversations),), fp32 on the CPU.

        Raises UserError for a conversation that is longer than the model's positions.
        """
        return scores.of_tokens(self.model, self.encode(conversations), advance, recovery, batch_tokens)

    def encode(self, conversations: Sequence[Messages]) -> list[list[int]]:
        """Token ids of each conversation, as the model's own template writes it."""
        encoded = [
            self.tokenizer.apply_chat_template(messages, return_dict=False) for messages in conversations
        ]
        longest = max(map(len, encoded), default=0)
        if longest > self.max_length:
            raise UserError(
                f"a conversation of {longest:,} tokens is longer than the {self.max_length:,} positions of the reward "
                f"model {self.path}"
            )
        return encoded


def load(
    path: str, revision: str | None = None, load_in_4bit: bool | None = None, trust_remote_code: bool = False
) -> RewardModel:
    """The reward model at `path`: the folder of a reward stage, an adapter, a whole model, or a Hub id.

    `load_in_4bit` None: as it was trained, where that is known; else in 16 bits. Raises UserError when it cannot be
    reached, is damaged, does not give exactly one score, or ships no chat template.
    """
    folder = next(
        (one for one in (Path(path) / "adapter", Path(path)) if (one / ADAPTER_CONFIG).is_file()), None
    )
    if folder is None:
        return _whole(path, revision, bool(load_in_4bit), trust_remote_code)
    sealing.check(folder)
    lora = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if lora.get("task_type") != "SEQ_CLS":
        raise UserError(f"{folder} is the adapter of a model that answers; it gives no score")
    if load_in_4bit is None:
        mark = AdapterMark.load(folder / MARK)
        load_in_4bit = bool(mark and (mark.trajectory or {}).get("model.load_in_4bit"))
    tokenizer = _tokenizer(str(folder), None, trust_remote_code)
    base, revision = lora["base_model_name_or_path"], lora.get("revision")
    positions = _config(base, revision, trust_remote_code).get_text_config().max_position_embeddings
    with quiet():
        model = _load(base, revision, load_in_4bit, trust_remote_code, positions)
        model = PeftModel.from_pretrained(model, str(folder))
    return _ready(path, model, tokenizer, tokenizer.pad_token_id, positions)


def _whole(path: str, revision: str | None, load_in_4bit: bool, trust_remote_code: bool) -> RewardModel:
    config = _config(path, revision, trust_remote_code)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or config.num_labels != 1:
        raise UserError(
            f"{path} is no reward model: its config names {', '.join(kinds) or 'no architecture'} with "
            f"{config.num_labels} labels; expected is one of ...ForSequenceClassification with 1"
        )
    tokenizer = _tokenizer(path, revision, trust_remote_code)
    config = config.get_text_config()
    positions = config.max_position_embeddings
    with quiet():
        model = _load(path, revision, load_in_4bit, trust_remote_code, positions)
    return _ready(path, model, tokenizer, config.pad_token_id, positions)


def _config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (*HUB_ERRORS, ValueError) as error:
        if Path(path).is_dir():
            raise UserError(f"{path} is no reward model: {' '.join(str(error).split())[:300]}") from None
        raise UserError(explain(error, "reward model", path, revision)) from None


def _load(
    path: str, revision: str | None, load_in_4bit: bool, trust_remote_code: bool, max_length: int
) -> Any:
    model, _ = score_head.from_pretrained(
        model_name=path,
        revision=revision,
        load_in_4bit=load_in_4bit,
        trust_remote_code=trust_remote_code,
        max_seq_length=max_length,  # else Unsloth cuts at 2,048 by itself
        dtype=None,
        use_gradient_checkpointing=False,
        use_exact_model_name=True,
    )
    return model


def _ready(path: str, model: Any, tokenizer: Any, pad_token_id: int | None, max_length: int) -> RewardModel:
    """Frozen, its head in fp32, and with the pad token that its makers gave it: Unsloth sets another on a GPU."""
    score_head.in_float32(model)
    model.requires_grad_(False)
    model.eval()
    model.config.get_text_config().pad_token_id = pad_token_id
    return RewardModel(path, model, tokenizer, max_length)


def _tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (*HUB_ERRORS, ValueError) as error:
        if Path(path).is_dir():
            raise UserError(
                f"the tokenizer in {path} cannot be read: {' '.join(str(error).split())[:300]}"
            ) from None
        raise UserError(explain(error, "reward model", path, revision)) from None
    if not tokenizer.chat_template:
        raise UserError(
            f"the reward model {path} ships no chat template: another one's would give it text that it never learnt on"
        )
    return tokenizer
