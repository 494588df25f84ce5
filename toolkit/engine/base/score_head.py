"""A model with one score in place of its vocabulary: what a reward model is loaded as, and trained as.

On a GPU through Unsloth (`num_labels`, unsloth/models/llama.py). Its CPU backend knows models that answer only
(unsloth_zoo/cpu/loader.py), so there it is plain transformers, PEFT and bitsandbytes, quantised as Unsloth does it. The
score is that of the last token that is no padding, by the id of the pad token: one that is an end token too would hide
the end of every row.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning
from unsloth import FastLanguageModel
from unsloth_zoo.cpu.loader import _disable_bnb_cpu_weight_packing, _resolve_dtype
from unsloth_zoo.peft_utils import SKIP_QUANTIZATION_MODULES

from toolkit.errors import UserError

HEAD = "score"  # transformers' name of it
WEIGHT = f"base_model.model.{HEAD}.weight"  # in a saved adapter


def from_pretrained(
    model_name: str, revision: str | None, load_in_4bit: bool, trust_remote_code: bool, **options: Any
) -> tuple[Any, Any]:
    """(model, tokenizer), called as Unsloth's own; a checkpoint without a head gets a new one."""
    with suppress_seqcls_warning():
        if torch.cuda.is_available():
            model, tokenizer = FastLanguageModel.from_pretrained(
                model_name=model_name,
                revision=revision,
                load_in_4bit=load_in_4bit,
                trust_remote_code=trust_remote_code,
                num_labels=1,
                **options,
            )
        else:
            dtype = _resolve_dtype(options["dtype"])  # fp32 where this CPU has no bf16 of its own
            known: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            quantised = {"quantization_config": _nf4(dtype)} if load_in_4bit else {}
            model = AutoModelForSequenceClassification.from_pretrained(
                model_name, num_labels=1, dtype=dtype, device_map="cpu", **quantised, **known
            )
            _disable_bnb_cpu_weight_packing(model)  # a packed weight has no right backward
            model.config.use_cache = False
            tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="right", **known)
    if not getattr(model, HEAD).weight.is_floating_point():
        raise UserError(
            f"{model_name} was quantised beforehand, and its settings would quantise the score too: name the same "
            "model in 16 bits, it is quantised as it is loaded"
        )
    return model, tokenizer


def get_peft_model(model: Any, random_state: int, **options: Any) -> Any:
    """A fresh LoRA, called as Unsloth's own, and the head trained whole. Both start from the seed alone."""
    head, generator = getattr(model, HEAD), torch.Generator().manual_seed(random_state)
    start = torch.randn(head.weight.shape, generator=generator) * model.config.initializer_range
    head.weight.data.copy_(start)
    if torch.cuda.is_available():
        made = FastLanguageModel.get_peft_model(model, random_state=random_state, **options)
    else:
        torch.manual_seed(random_state)
        if options.pop("use_gradient_checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        options.pop("max_seq_length")
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))
    assert getattr(made, HEAD).modules_to_save["default"].weight.requires_grad
    in_float32(made)
    return made


def is_on(model: Any) -> bool:
    """Whether a model, with LoRA or without, gives a score."""
    return hasattr(model, HEAD)


def weight_of(model: Any) -> torch.Tensor:
    """Of the head as it is trained."""
    return getattr(model, HEAD).modules_to_save["default"].weight.detach()  # type: ignore[no-any-return]


def in_float32(model: Any) -> None:
    """Lets the head compute in fp32: the steps of bf16 are 0.03 at a score of 6, and close scores would tie."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f".{name}.".endswith(
            (f".{HEAD}.", f".{HEAD}.modules_to_save.default.")
        ):
            module.forward = _Float32(module)  # type: ignore[method-assign, assignment]


class _Float32:
    """The forward of a linear layer, outside of autocast."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.linear.weight.float())


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(SKIP_QUANTIZATION_MODULES),
    )
