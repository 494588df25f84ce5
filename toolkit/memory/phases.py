"""What a stage holds at each of its moments: loss, backward of a layer, reference pass, evaluation.

Peak = frozen weights + LoRA state + scratch + the worst of the moments; each
is a mapping from item to bytes, made of `terms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from toolkit import hardware
from toolkit.hardware import GIB
from toolkit.memory import terms
from toolkit.recipe import stages
from toolkit.recipe.rl_section import RewardTerm
from toolkit.recipe.schema import Dpo, Kto, Recipe, Rl, Sft

Items = dict[str, float]  # bytes


@dataclass(frozen=True)
class Settings:
    """What the plan chose, or found pinned in the recipe's `memory`.

    `per_device_train_batch_size` rows (pairs in DPO), `gradient_accumulation_steps` times per optimizer step;
    `recompute_layers` decoder layers recompute; `loss_chunk_gib` bounds the logits that exist at one time. With
    `tokens_per_micro_batch` the rows, then those of a whole step, run in pieces of at most so many tokens, a longer
    row alone.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    recompute_layers: int
    loss_chunk_gib: float
    tokens_per_micro_batch: int | None = None

    def tokens_at_once(self, num_rows: int, width: int) -> int:
        """Of `num_rows` rows that each have up to `width` tokens, as many as go through the model at once."""
        if self.tokens_per_micro_batch is None:
            return num_rows * width
        return min(num_rows * width, max(self.tokens_per_micro_batch, width))

    def num_micro_batches(self, tokens: int) -> int:
        """Of a step over so many tokens, padding included."""
        if self.tokens_per_micro_batch is None:
            return self.gradient_accumulation_steps
        return math.ceil(tokens / self.tokens_per_micro_batch)

    def chosen(self) -> dict[str, Any]:
        """By the names of the recipe's `memory`; accumulation follows from the stage's effective batch size."""
        return {name: value for name, value in asdict(self).items() if name != "gradient_accumulation_steps"}


class Phases:
    """The moments of one stage of a recipe; what does not depend on the settings is worked out once.

    Without a GPU the terms are the same, but for dequantisation, staging buffers and the offload to the host.
    """

    def __init__(self, recipe: Recipe, stage: str, on_gpu: bool):
        section, lora, four_bit = recipe.section(stage), recipe.lora, recipe.model.load_in_4bit
        self.stage, self.architecture, self.on_gpu = stages.of(stage), recipe.model.architecture, on_gpu
        self.by_log_probs = "log_probs" in self.stage.memory_phases
        self.has_head = self.stage.answers
        tensors = terms.lora_tensors(self.architecture, lora)
        if not self.has_head:
            tensors = [*tensors, self.architecture.hidden_size]  # the trained row of the score
        self.adapter = terms.FP32 * sum(tensors)
        self.rl = section if isinstance(section, Rl) else None
        self.judges = [
            (reward.architecture or self.architecture, self._is_4bit(reward, four_bit))
            for reward in (self.rl.rewards if self.rl else ())
            if reward.model
        ]
        self.scratch = terms.dequantisation_bytes(self.architecture) if on_gpu and four_bit else 0
        self.frozen: Items = {
            "weights": terms.layer_weight_bytes(self.architecture, four_bit),
            "embeddings_and_head": terms.embedding_bytes(self.architecture, self.has_head)
            + terms.patched_bytes(self.architecture, lora),
            "dequantisation": self.scratch,
            "buffers": terms.BUFFERS_GIB * GIB if on_gpu else 0,
            "reward_models": sum(
                terms.layer_weight_bytes(judge, in_4bit) + terms.embedding_bytes(judge, has_head=False)
                for judge, in_4bit in self.judges
            ),
        }
        # Unsloth's CPU backend has no 8-bit optimizers and takes AdamW instead.
        optim = section.optim if on_gpu else "adamw_torch"
        self.trained: Items = self.frozen | {
            # weights and gradients; where a KL is taken the weights once more, as they began
            "lora": (3 if self.rl and self.rl.beta else 2) * self.adapter,
            "optimizer": terms.optimizer_bytes(optim, tensors),
        }
        # Packed rows take torch's own attention; the CPU backend packs nothing.
        self.packs = on_gpu and isinstance(section, Sft) and section.packing
        expanded_kv = on_gpu and not self.packs and hardware.has_xformers()
        self.kept_layer = terms.kept_layer_bytes(self.architecture, lora, expanded_kv)
        self.layer_backward = terms.layer_backward_bytes(self.architecture)
        evaluates = section.eval_datasets or section.eval_rows
        self.eval_rows = section.per_device_eval_batch_size if evaluates else 0
        self.reference_rows = section.precompute_ref_batch_size if isinstance(section, (Dpo, Kto)) else 0
        self.shares_prompts = isinstance(section, Dpo) and section.share_prompts

    @staticmethod
    def _is_4bit(reward: RewardTerm, as_recipe: bool) -> bool:
        """Of a reward model; one of the recipe's own runs is loaded as it was trained."""
        return as_recipe if stages.is_variant(reward.model or "") else reward.load_in_4bit

    def peak(self, settings: Settings, max_length: int) -> float:
        """Bytes at the worst moment."""
        return max(sum(items.values()) for _, items in self.worst(settings, max_length))

    def worst(self, settings: Settings, max_length: int) -> Iterator[tuple[str, Items]]:
        """Every moment at its worst over the batches whose rows have up to `max_length` tokens."""
        for phase in self.stage.memory_phases:
            yield from PHASES[phase](self, settings, self.stage.sequences_per_row * max_length)

    def loss(self, settings: Settings, tokens: int) -> Items:
        """Forward is done: all kept layers, three tensors of width h, one piece of the logits.

        And the head's gradient of the trained tokens, at most all of them: fp32 for log-probs, bf16 for the loss.
        """
        gradient = terms.FP32 if self.by_log_probs else terms.BF16
        held: float = (3 * terms.BF16 + gradient) * self.architecture.hidden_size * tokens
        if (
            self.shares_prompts
        ):  # hidden states put back where padding has them, twice a prompt, and their gradient
            held += 2 * 2 * terms.BF16 * self.architecture.hidden_size * tokens
        held += terms.logit_bytes(tokens, self.architecture, settings.loss_chunk_gib)
        return self._state(settings) | self._graph(settings, tokens) | {"loss": held}

    def score(self, settings: Settings, tokens: int) -> Items:
        """Forward is done: all kept layers, three tensors of width h, a score of each token and its gradient."""
        held = 3 * terms.BF16 * self.architecture.hidden_size * tokens + 2 * terms.FP32 * tokens
        return self._state(settings) | self._graph(settings, tokens) | {"loss": held}

    def layer(self, settings: Settings, tokens: int) -> Items:
        """Backward of a layer, recomputed while all kept ones wait; of a kept one where none recomputes."""
        recomputed = self.kept_layer if settings.recompute_layers else 0
        backward = (recomputed + self.layer_backward) * tokens
        scratch = {"dequantisation": 2 * self.scratch}  # beside the forward's
        return self._state(settings) | self._graph(settings, tokens) | {"layer_backward": backward} | scratch

    def reference(self, settings: Settings, tokens: int) -> Items:
        """Before training: no graph, gradients or optimizer, but a second copy of the adapter."""
        forward = self._forward(settings, tokens)
        return self.frozen | {"lora": self.adapter, "reference_pass": self.adapter + forward}

    def evaluation(self, settings: Settings, tokens: int) -> Items:
        """Between steps: no graph, but gradients and optimizer stay."""
        return self.trained | {"evaluation_pass": self._forward(settings, tokens)}

    def generation(self, width: int) -> Items:
        """The completions of a step, as many as are made at once: keys and values of all their tokens, what one layer
        makes of the prompts, and a token's logits thrice (as they come, in order, and as probabilities)."""
        assert self.rl is not None
        rows, prompt = self.rl.generated_at_once, max(0, width - self.rl.max_completion_length)
        cache = terms.cache_bytes(self.architecture) * rows * width
        prefill = terms.forward_bytes(self.architecture) * rows * prompt
        logits = 3 * terms.FP32 * self.architecture.vocab_size * rows
        return self.trained | {"generation": cache + max(prefill, logits)}

    def scoring(self, tokens: int) -> Items:
        """The largest reward model reads so many tokens of completions: a pass without a graph or a vocabulary."""
        widest = max((terms.forward_bytes(judge) for judge, _ in self.judges), default=0)
        scratch = max(
            (terms.dequantisation_bytes(judge) for judge, in_4bit in self.judges if in_4bit), default=0
        )
        return self.trained | {"scoring_pass": widest * tokens, "dequantisation": max(self.scratch, scratch)}

    def _state(self, settings: Settings) -> Items:
        """With the copy that recovery keeps of the gradients that earlier micro-batches of the step left."""
        in_parts = settings.gradient_accumulation_steps > 1 or settings.tokens_per_micro_batch is not None
        copies = self.adapter if in_parts else 0
        return self.trained | {"lora": self.trained["lora"] + copies}

    def _graph(self, settings: Settings, tokens: int) -> Items:
        """Kept activations and inputs of recomputed layers; on a GPU Unsloth offloads these but for one."""
        recomputed = settings.recompute_layers
        inputs = 1 if self.on_gpu else max(1, recomputed)
        return {
            "activations_kept": (self.architecture.num_hidden_layers - recomputed) * self.kept_layer * tokens,
            "recomputed_inputs": inputs * terms.BF16 * self.architecture.hidden_size * tokens,
        }

    def _forward(self, settings: Settings, tokens: int) -> float:
        """A pass without a graph: inside a layer, or at the head with its piece of the logits."""
        logits = terms.FP32 * tokens
        if self.has_head:
            logits = terms.logit_bytes(tokens, self.architecture, settings.loss_chunk_gib)
        at_head = 3 * terms.BF16 * self.architecture.hidden_size * tokens + logits
        return max(terms.forward_bytes(self.architecture) * tokens, at_head)


# What a stage's `memory_phases` name: each gives its moments for rows of `width` tokens, all sequences together.


def _loss(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    yield "loss", phases.loss(settings, settings.tokens_at_once(settings.per_device_train_batch_size, width))


def _score(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    yield "loss", phases.score(settings, settings.tokens_at_once(settings.per_device_train_batch_size, width))


def _layer(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    yield (
        "layer",
        phases.layer(settings, settings.tokens_at_once(settings.per_device_train_batch_size, width)),
    )


def _reference(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    yield "reference", phases.reference(settings, settings.tokens_at_once(phases.reference_rows, width))


def _evaluation(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    if phases.eval_rows:
        yield "evaluation", phases.evaluation(settings, settings.tokens_at_once(phases.eval_rows, width))


def _generation(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    yield "generation", phases.generation(width)


def _scoring(phases: Phases, settings: Settings, width: int) -> Iterator[tuple[str, Items]]:
    if phases.judges:
        tokens = settings.tokens_at_once(settings.per_device_train_batch_size, width)
        yield "scoring", phases.scoring(tokens)


PHASES: dict[str, Callable[[Phases, Settings, int], Iterator[tuple[str, Items]]]] = {
    "cross_entropy": _loss,
    "log_probs": _loss,
    "score": _score,
    "layer": _layer,
    "reference": _reference,
    "evaluation": _evaluation,
    "generation": _generation,
    "scoring": _scoring,
}
