"""Unsloth's forward for GPUs on CPU tensors, padded against shared prompts; prints what differed, as JSON.

Its Python runs as it is: model, decoder layer, attention, dispatch. Only its two Triton kernels (norm, rotary
positions) have torch in their place, since no CPU can run them.
"""

import json
import os
from typing import Any

os.environ["UNSLOTH_ALLOW_CPU"] = "1"

from toolkit import env

env.prepare("expandable_segments:True", use_gpu=True)

import torch  # noqa: E402
import transformers.models.llama.modeling_llama as of_transformers  # noqa: E402
import unsloth.models.llama as of_unsloth  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from unsloth.utils import attention_dispatch  # noqa: E402

import toolkit.engine  # noqa: E402, F401
from toolkit.engine.shared_prompt import attention  # noqa: E402
from toolkit.engine.shared_prompt.hooks import SharedPrompts, TreeCollator  # noqa: E402


def norm(layer: Any, x: Any, gemma: bool = False, **unused: Any) -> Any:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)).to(
        x.dtype
    ) * layer.weight


def rotate(q: Any, k: Any, cos: Any, sin: Any, indices: Any = None) -> Any:
    at = torch.arange(q.shape[2]) if indices is None else indices.reshape(-1)[: q.shape[2]].long()
    c, s = cos[at][None, None], sin[at][None, None]

    def turned(x: Any) -> Any:
        half = x.shape[-1] // 2
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    return turned(q), turned(k)


class Rotary(torch.nn.Module):
    def __init__(self, config: Any, **unused: Any):
        super().__init__()
        rate = 1 / 1e4 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(256).float(), rate).repeat(1, 2)
        self.tables = angles.cos(), angles.sin()

    def extend_rope_embedding(self, *unused: Any, **also: Any) -> None:
        pass

    def get_cached(self, *unused: Any, **also: Any) -> Any:
        return self.tables


def main() -> None:
    from tests.engine.shared_prompt.test_equality import (  # after unsloth
        LENGTHS,
        PAD,
        SMALL,
        bottom_right,
        rows,
    )

    of_unsloth.fast_rms_layernorm, of_unsloth.fast_rope_embedding = norm, rotate
    of_unsloth.FastLlamaModel.pre_patch()
    of_transformers.LlamaRotaryEmbedding = lambda config, **unused: Rotary(config)  # type: ignore[misc, assignment]
    torch.manual_seed(0)
    model = of_transformers.LlamaForCausalLM(of_transformers.LlamaConfig(**SMALL)).float().train()
    model.model.max_seq_length = model.max_seq_length = 128
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)

    def hidden(batch: Any) -> tuple[Any, Any]:
        """Hidden states of the real tokens, and the gradients of a sum over them."""
        model.zero_grad()
        real = batch["attention_mask"].bool()
        given = {key: value for key, value in batch.items() if key != "completion_mask"}
        states = model.model(**given, use_cache=False).last_hidden_state[real]
        states.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return states.detach(), torch.cat(gradients)

    def differences(found: Any) -> dict[str, float]:
        return {
            "states": (found[0] - padded[0]).abs().max().item(),
            "gradients": ((found[1] - padded[1]).norm() / padded[1].norm()).item(),
        }

    collator = DataCollatorForPreference(PAD)
    batch = rows(LENGTHS)
    padded = hidden(collator(batch))
    sharing = SharedPrompts(model, 128)
    said: dict[str, Any] = {
        "kernel": sharing.kernel,
        "segments": differences(hidden(TreeCollator(collator)(batch))),
    }
    said["calls"], said["layers"] = sharing.uses.attention_calls, SMALL["num_hidden_layers"]
    attention.reach_unsloth(lambda q, k, v, tree, scale: bottom_right(q, k, v, tree))
    said["varlen layout"] = differences(hidden(TreeCollator(collator)(batch)))
    said["module"] = attention_dispatch._flex_shared_prefix_attention.__module__
    print(json.dumps(said))


if __name__ == "__main__":
    main()
