"""Pairs whose prompt is run once are the pairs that TRL pads: log-probs, loss and gradients, in every family."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.conftest import ROOT
from toolkit.engine.shared_prompt import attention
from toolkit.engine.shared_prompt.hooks import NotShared, SharedPrompts, TreeCollator
from toolkit.engine.shared_prompt.tree import tree_of

VOCABULARY, PAD = 128, 0
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "granite",
    "cohere",
    "olmo2",
    "phi3",
)
LENGTHS = ((20, 7, 9), (1, 5, 12), (33, 1, 6), (8, 14, 1))

lengths = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def rows(of: Any, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), one, strict=True)
        }
        for one in of
    ]


def small(family: str, **changed: Any) -> Any:
    """A model of the family with random weights, far enough from zero that a wrong mask shows."""
    torch.manual_seed(0)
    implementation = changed.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family, **(SMALL | changed))
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=implementation
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def log_probs(model: Any, batch: Any) -> torch.Tensor:
    """Of every reply: chosen first, then rejected."""
    scored = batch["completion_mask"][:, 1:].bool()
    given = {key: value for key, value in batch.items() if key != "completion_mask"}
    logits = model(**given, use_cache=False).logits[:, :-1].float()
    each = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return each.where(scored, 0.0).sum(1)


def dpo(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probs, a DPO loss against 0, and its gradients."""
    model.zero_grad()
    values = log_probs(model, batch)
    chosen, rejected = values.chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    return values.detach(), loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_log_probs_loss_and_gradients(family: str) -> None:
    model = small(family).train()
    padded = DataCollatorForPreference(PAD)
    values, loss, gradients = dpo(model, padded(rows(LENGTHS)))
    sharing = SharedPrompts(model, 128)
    shared_values, shared_loss, shared_gradients = dpo(model, TreeCollator(padded)(rows(LENGTHS)))
    assert (sharing.uses.passes, sharing.uses.attention_calls) == (1, 2)
    torch.testing.assert_close(shared_values, values, rtol=0, atol=1e-3)
    torch.testing.assert_close(shared_loss, loss, rtol=0, atol=1e-5)
    for one, other in zip(shared_gradients, gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm().clamp_min(1e-6)
    torch.testing.assert_close(log_probs(model, padded(rows(LENGTHS))), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "changed", "reason"),
    [
        ("gemma2", {}, "caps its attention's logits"),
        ("mistral", {"sliding_window": 64}, "longer than the window of 64"),
        ("llama", {"attention_dropout": 0.1}, "drops attention weights"),
        ("llama", {"attn_implementation": "eager"}, "is eager, not sdpa"),
    ],
)
def test_where_a_row_would_see_something_else_prompts_are_not_shared(
    family: str, changed: Any, reason: str
) -> None:
    with pytest.raises(NotShared, match=reason):
        SharedPrompts(small(family, **changed), 128)


@given(st.lists(lengths, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_tree_says_where_each_token_of_the_padded_batch_is(of: Any) -> None:
    batch = DataCollatorForPreference(PAD)(rows(of))
    tree = tree_of(of, batch["input_ids"].shape[1])
    real = batch["attention_mask"].bool()
    flat = batch["input_ids"].flatten()[tree.from_padded]
    assert sum(map(sum, of)) == tree.T
    assert torch.equal(flat[tree.to_padded][real], batch["input_ids"][real])
    at = torch.arange(real.shape[1]).expand_as(real)
    assert torch.equal(tree.positions[tree.to_padded][real], at[real])


@given(st.lists(lengths, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_segments_and_the_varlen_layout_see_what_the_definition_allows(of: Any) -> None:
    tree = tree_of(of, 20)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tree.T, 8, generator=generator) for heads in (4, 2, 2))
    right = scaled_dot_product_attention(q, k, v, attn_mask=tree.may_see(), enable_gqa=True)
    torch.testing.assert_close(attention.segments(q, k, v, tree), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bottom_right(q, k, v, tree), right, rtol=1e-5, atol=1e-5)


def bottom_right(q: Any, k: Any, v: Any, tree: Any) -> torch.Tensor:
    """What FlashAttention documents of `cu_q`, `cu_k` and a causal mask, written out."""
    outs = []
    borders: Iterator[Any] = zip(tree.cu_q[:-1], tree.cu_q[1:], tree.cu_k[:-1], tree.cu_k[1:], strict=True)
    for first_q, last_q, first_k, last_k in borders:
        sees = torch.ones(last_q - first_q, last_k - first_k, dtype=torch.bool)
        sees = sees.tril(int((last_k - first_k) - (last_q - first_q)))
        keys, values = (x[:, :, tree.kv][:, :, first_k:last_k] for x in (k, v))
        outs.append(
            scaled_dot_product_attention(
                q[:, :, first_q:last_q], keys, values, attn_mask=sees, enable_gqa=True
            )
        )
    assert tree.max_q == max((tree.cu_q[1:] - tree.cu_q[:-1]).tolist())
    assert tree.max_k == max((tree.cu_k[1:] - tree.cu_k[:-1]).tolist())
    return torch.cat(outs, dim=2)


@pytest.mark.long
def test_unsloths_forward_for_gpus_runs_a_tree_as_the_padded_pairs() -> None:
    command = [sys.executable, "-m", "tests.engine.shared_prompt.cuda_path"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert (said["calls"], said["kernel"]) == (said["layers"], "segments")
    for layout in ("segments", "varlen layout"):
        assert said[layout]["states"] < 1e-4 and said[layout]["gradients"] < 1e-5, said
