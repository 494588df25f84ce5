"""Bytes of every single thing that QLoRA training holds: pure arithmetic, and the one home of its constants.

Symbols as in the sources: h hidden, I intermediate, L layers, V vocabulary; T is the tokens of a micro-batch.
Weights, LoRA and optimizer are exact and tested against the real modules. What a step holds for a moment is
read from the sources of Unsloth and predicted: nothing here was measured by us.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from toolkit.cards import Card
from toolkit.errors import UserError
from toolkit.hardware import GIB
from toolkit.recipe.schema import Architecture, Lora
from toolkit.recipe.sections import FUSED

BF16, FP32 = 2, 4  # bytes

# bitsandbytes functional.quantize_4bit, compress_statistics: one byte of absmax a block, those nested again.
NF4_BLOCK, NESTED_BLOCK = 64, 256
# bitsandbytes optim/optimizer.py: two uint8 states, each with an fp32 absmax per block; small tensors fp32.
OPTIMIZER_BLOCK, SMALLEST_8BIT = 256, 4096
# unsloth_zoo fused_losses/fused_linear.py, fused_linear_rows: rows of fp32 logits that its head makes at once.
MIN_LOGITS, MIN_ROWS, MAX_ROWS = 512 * 151_936, 512, 4096

# RoPE tables, host staging and cuBLAS workspace, up to 0.15 GiB: an estimate, not measured.
BUFFERS_GIB = 0.15
# The CUDA context lies outside torch's allocator (about 0.5 GiB: an estimate, not measured).
CONTEXT_GIB = 0.5
# Fragmentation of 0.2 to 0.5 GiB and the model's own uncertainty: an RTX 4090 of 23.5 GiB is planned to 22.0
# (not measured).
RESERVE_GIB = 1.0
# Share of the RAM that a run without a GPU may plan for; the rest is for Python, torch and the system (ours).
RAM_SHARE = 0.75
# Of a saved adapter or checkpoint beside its weights: tokenizer (Gemma's: 40 MB), template, configs; at most.
SMALL_FILES_GIB = 0.06


def head_dim(architecture: Architecture) -> int:
    """Width of an attention head: the architecture's own (Gemma 7B: 256), h / heads where it says nothing."""
    own: int | None = getattr(architecture, "head_dim", None)
    return own or architecture.hidden_size // architecture.num_attention_heads


def linears(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) features of each linear of one decoder layer, Llama's names. Biases (Qwen's) are left out."""
    h, wide = architecture.hidden_size, architecture.intermediate_size
    q, kv = _attention_widths(architecture)
    return {
        "q_proj": (h, q),
        "k_proj": (h, kv),
        "v_proj": (h, kv),
        "o_proj": (q, h),
        "gate_proj": (h, wide),
        "up_proj": (h, wide),
        "down_proj": (wide, h),
    }


def targets(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) features of whatever can get an adapter: each linear of a layer, and those that some families fuse."""
    known = linears(architecture)
    fused = {
        name: (known[parts[0]][0], sum(known[part][1] for part in parts)) for name, parts in FUSED.items()
    }
    return known | fused


def linear_parameters(architecture: Architecture) -> int:
    """Weights in the linears of all decoder layers."""
    return architecture.num_hidden_layers * sum(i * o for i, o in linears(architecture).values())


def quantised_bytes(num_weights: int) -> int:
    """Bytes of one tensor in NF4 with double quantisation: n (1/2 + 1/64 + 4/16384) and its roundings.

    Packed nibbles, a uint8 absmax per 64 weights, an fp32 absmax per 256 of those, one fp32 offset. The
    lookup tables (1,088 bytes, shared or not by the way of loading) are left out.
    """
    blocks = math.ceil(num_weights / NF4_BLOCK)
    return math.ceil(num_weights / 2) + blocks + FP32 * math.ceil(blocks / NESTED_BLOCK) + FP32


def layer_weight_bytes(architecture: Architecture, load_in_4bit: bool) -> int:
    """All decoder layers: linears in NF4 or bf16, norms (two a layer and the last one) in bf16."""
    per_layer = sum(
        quantised_bytes(i * o) if load_in_4bit else BF16 * i * o for i, o in linears(architecture).values()
    )
    norms = BF16 * architecture.hidden_size * (2 * architecture.num_hidden_layers + 1)
    return architecture.num_hidden_layers * per_layer + norms


def embedding_bytes(architecture: Architecture, has_head: bool = True) -> int:
    """Embedding and head in bf16; both are counted unless the architecture says that they are one (Gemma's
    are), or the model has no head over the vocabulary.
    """
    copies = _matrices(architecture) if has_head else 1
    return copies * BF16 * architecture.vocab_size * architecture.hidden_size


def patched_bytes(architecture: Architecture, lora: Lora) -> int:
    """What trained rows cost beside themselves: a copy of embedding and head with the rows put in, and its gradient
    (peft/tuners/trainable_tokens/layer.py, get_merged_weights)."""
    return 2 * embedding_bytes(architecture) if lora.trainable_tokens else 0


def lora_tensors(architecture: Architecture, lora: Lora) -> list[int]:
    """Numbers of weights of A (r x in) and B (out x r), for every targeted linear of every layer; and of trained rows.

    Raises UserError for a target that a decoder layer does not have.
    """
    known = targets(architecture)
    if unknown := [name for name in lora.target_modules if name not in known]:
        raise UserError(
            f"lora.target_modules: got {', '.join(unknown)}, which no decoder layer has; "
            f"known: {', '.join(known)}"
        )
    one_layer = [lora.r * features for name in lora.target_modules for features in known[name]]
    return one_layer * architecture.num_hidden_layers + token_tensors(architecture, lora)


def token_tensors(architecture: Architecture, lora: Lora) -> list[int]:
    """Numbers of weights in the rows of trained tokens: one tensor for each of embedding and head; none without any."""
    if not lora.trainable_tokens:
        return []
    return [len(lora.trainable_tokens) * architecture.hidden_size] * _matrices(architecture)


def lora_parameters(architecture: Architecture, lora: Lora) -> int:
    """Trainable weights: r (in + out) for each targeted linear (Hu et al. 2021, section 4.1)."""
    return sum(lora_tensors(architecture, lora))


def optimizer_bytes(optim: str, tensors: Iterable[int]) -> int:
    """States of AdamW over tensors of these sizes; adamw_torch (foreach) with the fp32 temporary of its step.

    The paged one is counted in full: its pages lie on the card while it steps.
    """
    if "8bit" in optim:
        return sum(
            2 * n + 2 * FP32 * math.ceil(n / OPTIMIZER_BLOCK) if n >= SMALLEST_8BIT else 2 * FP32 * n
            for n in tensors
        )
    return sum(tensors) * FP32 * (3 if optim == "adamw_torch" else 2)


def kept_layer_bytes(architecture: Architecture, lora: Lora, expanded_kv: bool = False) -> int:
    """Bytes per token that one layer holds from forward to backward when it does not recompute.

    8 h for both norms' inputs and outputs, 4 q + 4 kv for attention's q, k, v and output, 4 I for gate and
    up, 4 a head for the log-sum-exp, 8 for the norms' scales (unsloth kernels/fast_lora.py,
    rms_layernorm.py). Without LoRA on all three linears of the MLP its fused kernel steps aside and autograd
    keeps 6 I. Dropout: a bool per input. `expanded_kv`: xFormers keeps keys and values as wide as the queries.
    """
    h, wide = architecture.hidden_size, architecture.intermediate_size
    q, kv = _attention_widths(architecture)
    fused = {"gate_proj", "up_proj", "down_proj"} <= set(lora.target_modules)
    kv = q if expanded_kv else kv
    kept = 8 * h + 4 * q + 4 * kv + (4 if fused else 6) * wide + 4 * architecture.num_attention_heads + 8
    masks = sum(targets(architecture)[name][0] for name in lora.target_modules) if lora.lora_dropout else 0
    return kept + masks


def layer_backward_bytes(architecture: Architecture) -> int:
    """Bytes per token that the backward of one layer needs beside what the layer kept.

    Unsloth measured 42 h per token for a recomputed layer of Llama-3.1-8B (unsloth_zoo block_swap.py:569).
    That is what a layer keeps, the gradient of the MLP's inner width (2 I, fast_lora.py) and four bf16
    tensors of width h: 42.03 h. In these terms it holds for other shapes too; 42 h would be too little for
    Gemma 7B, whose I is 8 h.
    """
    return 2 * architecture.intermediate_size + 8 * architecture.hidden_size


def forward_bytes(architecture: Architecture) -> int:
    """Bytes per token that live at once in a layer of a forward pass without a graph (computed)."""
    return 6 * architecture.intermediate_size + 6 * architecture.hidden_size


def dequantisation_bytes(architecture: Architecture) -> int:
    """The largest linear of a layer in bf16: Unsloth's one scratch (unsloth kernels/utils.py, _scratch)."""
    return BF16 * max(i * o for i, o in linears(architecture).values())


def logit_bytes(tokens: int, architecture: Architecture, chunk_gib: float) -> int:
    """fp32 logits that Unsloth's fused head makes at once (unsloth_zoo fused_linear.py, fused_linear_rows).

    SFT's loss and DPO's log-probs take the same rows; a card of up to 24.5 GiB makes them in tiles, with fewer.
    """
    vocab = architecture.vocab_size
    least = min(max(_power_of_two(MIN_LOGITS / vocab), MIN_ROWS), MAX_ROWS)
    rows = min(max(_power_of_two(tokens * architecture.hidden_size / vocab), least), MAX_ROWS)
    rows = min(rows, max(2, int(chunk_gib * GIB) // (FP32 * vocab)), tokens)
    return FP32 * vocab * rows


def forward_flops_per_token(architecture: Architecture) -> float:
    """Matrix products of a pass without gradients per token, at all of which the head is read: 2 a weight."""
    return 2.0 * (linear_parameters(architecture) + architecture.vocab_size * architecture.hidden_size)


def flops_per_token(architecture: Architecture, recompute_layers: int, has_head: bool = True) -> float:
    """Matrix products of a training step per token: 2 a weight forward, 2 backward (no gradient of a frozen
    weight), 2 more where recomputed; the head is never recomputed. LoRA's and attention's own are left out.
    """
    share = recompute_layers / architecture.num_hidden_layers
    head = architecture.vocab_size * architecture.hidden_size if has_head else 0
    return 2 * linear_parameters(architecture) * (2 + share) + 4 * head


def step_seconds(
    architecture: Architecture,
    card: Card,
    load_in_4bit: bool,
    tokens: int,
    micro_batches: float,
    recompute_layers: int,
    has_head: bool = True,
) -> float | None:
    """Floor of an optimizer step over `tokens` tokens: its products at the card's full rate, and once a
    micro-batch NF4 read and bf16 written. None where the rates are unknown.
    """
    if card.bf16_tflops is None or card.bandwidth_gb_s is None:
        return None
    seconds = tokens * flops_per_token(architecture, recompute_layers, has_head) / (card.bf16_tflops * 1e12)
    if load_in_4bit:
        moved = layer_weight_bytes(architecture, True) + BF16 * linear_parameters(architecture)
        seconds += micro_batches * moved / (card.bandwidth_gb_s * 1e9)
    return seconds


def generation_seconds(
    architecture: Architecture, card: Card, load_in_4bit: bool, tokens: int
) -> float | None:
    """Floor of so many tokens after one another: layers and head read once for each. None where the rate is unknown."""
    if card.bandwidth_gb_s is None:
        return None
    head = BF16 * architecture.vocab_size * architecture.hidden_size
    return tokens * (layer_weight_bytes(architecture, load_in_4bit) + head) / (card.bandwidth_gb_s * 1e9)


def generation_bytes(architecture: Architecture) -> int:
    """Bytes that a token of a prompt or an answer holds while answers are given.

    Keys and values of all layers, and what one layer makes of a prompt at a time: its input, norm and output, q, k, v
    and attention, gate, up and their product; all in bf16 (read from Unsloth's forward, not measured).
    """
    q, kv = _attention_widths(architecture)
    h, wide = architecture.hidden_size, architecture.intermediate_size
    return cache_bytes(architecture) + BF16 * (3 * h + 2 * q + 2 * kv + 3 * wide)


def cache_bytes(architecture: Architecture) -> int:
    """Keys and values of one token in all layers, in bf16."""
    _, kv = _attention_widths(architecture)
    return 2 * BF16 * kv * architecture.num_hidden_layers


def saved_gib(lora_gib: float, num_checkpoints: int) -> float:
    """Disk for an adapter and so many checkpoints beside it.

    A checkpoint is the adapter again and AdamW's two states, at most as large each.
    """
    return lora_gib + SMALL_FILES_GIB + num_checkpoints * (3 * lora_gib + SMALL_FILES_GIB)


def _attention_widths(architecture: Architecture) -> tuple[int, int]:
    """Output features of q_proj and of k_proj and v_proj."""
    width = head_dim(architecture)
    return architecture.num_attention_heads * width, architecture.num_key_value_heads * width


def _matrices(architecture: Architecture) -> int:
    return 1 if getattr(architecture, "tie_word_embeddings", False) else 2


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above `value`, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(value, 1))))
