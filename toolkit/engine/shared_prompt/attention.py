"""Attention over a tree: two causal segments a pair on any device, one varlen launch on a GPU that proved it right.

FlashAttention aligns a causal mask to the bottom right where there are fewer queries than keys; that is what lets the
rejected reply be queries over prompt + rejected. PyTorch's own tests do not cover unequal lengths: `varlen_is_right`
asks the card at hand, backward included, and segments take its place where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from toolkit.engine.shared_prompt.tree import Tree, tree_of

KEYWORD = "prefix_seg_info"  # by which Unsloth's forwards for GPUs hand a table of shared prefixes down
PROVED_ON = ((40, 24, 17), (3, 70, 1), (129, 5, 64))  # lengths of the pairs that varlen is proved on
TOLERANCE = (
    0.02  # of a bf16 kernel against fp32, relative to the largest value; a leak or a shift gives about 1
)

# (queries (1, H, T, D), keys and values (1, H_kv, T, D), tree, scale) -> (1, H, T, D)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Tree, float | None], torch.Tensor]


def segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float | None = None
) -> torch.Tensor:
    """Prompt + chosen of a pair, then its rejected reply over prompt + rejected: no product that a mask throws away."""
    outs, start, grouped = [], 0, q.shape[1] != k.shape[1]
    for prompt, chosen, rejected in tree.lengths:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        query, key, value = (x[:, :, start:middle] for x in (q, k, v))
        outs.append(
            scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        )
        keys, values = (
            torch.cat([x[:, :, start : start + prompt], x[:, :, middle:end]], dim=2) for x in (k, v)
        )
        sees = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=q.device).tril(prompt)
        outs.append(
            scaled_dot_product_attention(
                q[:, :, middle:end], keys, values, attn_mask=sees, scale=scale, enable_gqa=grouped
            )
        )
        start = end
    return torch.cat(outs, dim=2)


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float | None = None
) -> torch.Tensor:
    """The same in one launch. Only keys and values of the prompts are gathered twice; the gradients of both add up."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.shape[1] != k.shape[1]
    queries, keys, values = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # (T, H, D)
    out: Any = varlen_attn(
        queries.contiguous(),
        keys.index_select(0, tree.kv),
        values.index_select(0, tree.kv),
        tree.cu_q,
        tree.cu_k,
        tree.max_q,
        tree.max_k,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    return out.transpose(0, 1).unsqueeze(0)  # type: ignore[no-any-return]


def varlen_is_right(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether varlen attention gives what a masked fp32 attention does on this GPU: output and all three gradients."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    tree = tree_of(PROVED_ON, max(p + max(c, r) for p, c, r in PROVED_ON)).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, tree.T, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    *qkv, gradient = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes
    )
    try:
        ours = _with_gradients(lambda q, k, v: varlen(q, k, v, tree), qkv, gradient)
    except (ImportError, TypeError, RuntimeError, NotImplementedError):  # an older torch, another signature
        return False
    sees, grouped = tree.may_see().cuda(), heads != kv_heads
    right = _with_gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=grouped),
        [x.float() for x in qkv],
        gradient.float(),
    )
    return all(
        bool((one.float() - other).abs().max() <= TOLERANCE * other.abs().max())
        for one, other in zip(ours, right, strict=True)
    )


def _with_gradients(
    attend: Callable[..., torch.Tensor], qkv: list[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    out.backward(gradient)  # type: ignore[no-untyped-call]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def reach_transformers(attend: Attend) -> None:
    """Lets transformers' "sdpa" attend over a tree where one is handed down; without one it is what it was."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = getattr(plain, "without_trees", plain)

    def sdpa(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tree = kwargs.pop(KEYWORD, None)
        if tree is None:
            return plain(module, query, key, value, attention_mask, *args, **kwargs)
        out = counted(attend)(query, key, value, tree, kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    sdpa.without_trees = plain  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa)


def reach_unsloth(attend: Attend) -> None:
    """The same for Unsloth's forwards for GPUs, whose queries, keys and values are (1, T, H, D)."""
    from unsloth.utils import attention_dispatch
    from unsloth.utils.prefix_grouper_kernel import flex_shared_prefix_attention

    def shared_prefix(q: Any, k: Any, v: Any, table: Any, scale: float | None = None, **kwargs: Any) -> Any:
        if not isinstance(table, Tree):  # GRPO's own
            return flex_shared_prefix_attention(q, k, v, table, scale=scale, **kwargs)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return counted(attend)(*heads_first, table, scale).transpose(1, 2)  # type: ignore[call-arg]

    attention_dispatch._flex_shared_prefix_attention = shared_prefix


def counted(attend: Attend) -> Attend:
    """The same, noted on the tree's `uses`."""

    def attend_and_count(q: Any, k: Any, v: Any, tree: Tree, scale: float | None) -> torch.Tensor:
        if tree.uses is not None:
            tree.uses.attention_calls += 1
        return attend(q, k, v, tree, scale)

    return attend_and_count
