"""Single measurements of gpu.py, all on one loaded model: the toolkit's trainers, and stock ones."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toolkit.engine.base import model, oom, recompute, vram
from toolkit.engine.reference import precompute, proof
from toolkit.engine.train import dpo, sft
from toolkit.run.rundir import EVENTS
from toolkit.training import trainer_args

# The toolkit's engine imports unsloth, which must come before these.
import torch  # isort: skip
from datasets import Dataset  # isort: skip
from rich.console import Console  # isort: skip
from transformers import PrinterCallback, TrainerCallback  # isort: skip
from trl import DPOConfig, SFTConfig  # isort: skip

from benchmarks import random_base
from toolkit.hardware import GIB
from toolkit.memory.plan import Settings
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe

ON_GPU = torch.cuda.is_available()
TOKENIZER = Path(__file__).resolve().parent.parent / "recipes" / "tiny" / "base"
ROOM_ROWS = 2  # without a GPU nothing runs out by itself: so many rows "fit" in the trial of recovery


class Clock(TrainerCallback):
    """Seconds of each optimizer step but the first, which also compiles and makes the optimizer's states."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


class Bench:
    """One base model with one LoRA; each trial trains it a few steps on random rows of an exact length."""

    def __init__(self, recipe: Recipe, max_length: int, folder: Path):
        self._folder, self._console = folder, Console(quiet=True)
        base = random_base.build(folder / "base", recipe.model.architecture, TOKENIZER)
        own = load(str(recipe._file), ("gpu=null", f"model.path={base}", "model.revision=null"))
        settings = Settings(1, 1, recipe.model.architecture.num_hidden_layers, 0.5)
        self._loaded = model.load(own, max_length, settings)
        model.attach_lora(self._loaded, own, settings, max_length)

    def point(self, recipe: Recipe, stage: str, settings: Settings, steps: int) -> dict[str, Any]:
        """Peak memory and seconds per step of the toolkit with these settings."""
        with loss_chunk(settings.loss_chunk_gib):
            return self._train(lambda: self._toolkit(recipe, stage, settings, steps), settings, steps)

    def stock(self, recipe: Recipe, stage: str, settings: Settings, steps: int) -> dict[str, Any]:
        """The same rows and effective batch as a plain script has them: Unsloth's and TRL's own defaults."""
        with loss_chunk(None):
            result = oom.attempt(
                lambda: self._train(lambda: self._stock(recipe, stage, settings, steps), None, steps)
            )
        return {"step_seconds": []} if isinstance(result, oom.OutOfMemory) else result

    def out_of_memory(self, recipe: Recipe, settings: Settings) -> dict[str, Any]:
        """Trains with settings that cannot fit. Returns the events and how far it came all the same."""
        with loss_chunk(settings.loss_chunk_gib), scarce():
            result = self._train(lambda: self._toolkit(recipe, "sft", settings, 2), settings, 2)
        return {"events": result["events"], "steps": result["steps"], "step_seconds": result["step_seconds"]}

    def _train(self, build: Callable[[], Any], settings: Settings | None, steps: int) -> dict[str, Any]:
        trainer, clock = build(), Clock()
        trainer.remove_callback(PrinterCallback)
        count = len(recompute.layers(self._loaded.model)) if settings is None else settings.recompute_layers
        trainer.add_callback(recompute.Recompute(count))
        trainer.add_callback(clock)
        oom.free_memory()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
        result = {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if ON_GPU else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if ON_GPU else None,
            "step_seconds": clock.seconds or [(time.perf_counter() - started) / steps],
            "steps": trainer.state.global_step,
            "events": trainer.recovery.events if settings is not None else [],
        }
        # accelerate wrapped the model's forward; the next trainer shall not wrap it once more.
        trainer.accelerator.unwrap_model(self._loaded.model, keep_fp32_wrapper=False)
        self._loaded.model.zero_grad(set_to_none=True)
        return result

    def _toolkit(self, recipe: Recipe, stage: str, settings: Settings, steps: int) -> Any:
        section, output = recipe.section(stage), self._folder / "run"
        count = steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        common = {
            "model": self._loaded.model,
            "train_dataset": rows(stage, count, section.max_length),
            "processing_class": self._loaded.tokenizer,
            "recovery": oom.Recovery(self._folder / EVENTS, self._console),
        }
        with model.keep_float32(self._loaded.model):
            if stage == "sft":
                arguments = trainer_args.sft(recipe, settings, output) | {"max_steps": steps}
                return sft.RecoveringSFTTrainer(args=SFTConfig(**arguments), **common)
            arguments = trainer_args.dpo(recipe, settings, output) | {"max_steps": steps}
            trainer = dpo.TokenisedDPOTrainer(args=DPOConfig(**arguments), ref_model=None, **common)
        precompute.precompute(trainer, recipe.dpo.precompute_ref_batch_size, self._console, anew=True)
        proof.drop(trainer)
        return trainer

    def _stock(self, recipe: Recipe, stage: str, settings: Settings, steps: int) -> Any:
        """Micro-batches of 2, all layers recomputed, the reference beside the policy: as Unsloth's notebooks do."""
        effective = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        micro = 2 if effective % 2 == 0 else 1
        arguments = {
            "output_dir": str(self._folder / "stock"),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": effective // micro,
            "max_steps": steps,
            "max_length": recipe.section(stage).max_length,
            "optim": "adamw_8bit",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        common = {
            "model": self._loaded.model,
            "train_dataset": rows(stage, steps * effective, recipe.section(stage).max_length),
            "processing_class": self._loaded.tokenizer,
        }
        with model.keep_float32(self._loaded.model):
            if stage == "sft":
                arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
                return sft.SFTTrainer(args=SFTConfig(**arguments), **common)
            return StockDPOTrainer(args=DPOConfig(**arguments), ref_model=None, **common)


class StockDPOTrainer(dpo.DPOTrainer):  # type: ignore[misc]
    """TRL's, but for rows that are tokenised already. Its copy of the adapter goes when it is done."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if proof.REF_ADAPTER in self.model.peft_config:
                self.model.delete_adapter(proof.REF_ADAPTER)


def rows(stage: str, count: int, tokens: int) -> Dataset:
    """`count` rows (pairs) of exactly `tokens` tokens; of a pair the first half is the prompt."""
    ids = torch.randint(20, 1000, (2, count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    if stage == "sft":
        return Dataset.from_dict({"input_ids": ids[0], "labels": ids[0], "length": [tokens] * count})
    half = tokens // 2
    return Dataset.from_dict(
        {
            "prompt_ids": [row[:half] for row in ids[0]],
            "chosen_ids": [row[half:] for row in ids[0]],
            "rejected_ids": [row[half:] for row in ids[1]],
            "length": [tokens] * count,
        }
    )


@contextlib.contextmanager
def loss_chunk(gib: float | None) -> Iterator[None]:
    """Bounds the logits as env.prepare does before the import; here between trials. None: Unsloth's own default."""
    before = [getattr(module, name) for module, name, _ in _chunk_settings()]
    if gib is not None:
        for module, name, kind in _chunk_settings():
            setattr(module, name, kind(gib))
    _forget_budgets()
    try:
        yield
    finally:
        for (module, name, _), old in zip(_chunk_settings(), before, strict=True):
            setattr(module, name, old)
        _forget_budgets()


def _chunk_settings() -> list[tuple[Any, str, type]]:
    """Where Unsloth keeps what LOSS_CHUNK_VARIABLE said at import: module, name, type. Not loaded on a CPU."""
    places = (("fused_linear", "_CHUNK_GB", float),)
    loaded = [
        (sys.modules.get(f"unsloth_zoo.fused_losses.{module}"), name, kind) for module, name, kind in places
    ]
    return [(module, name, kind) for module, name, kind in loaded if hasattr(module, name)]


def _forget_budgets() -> None:
    for module, _, _ in _chunk_settings():
        for cached in ("_budget_bytes", "_get_chunk_multiplier"):
            getattr(getattr(module, cached, None), "cache_clear", lambda: None)()


@contextlib.contextmanager
def scarce() -> Iterator[None]:
    """Without a GPU: more than ROOM_ROWS rows raise what a full card would. On one, its memory is scarce enough."""
    if ON_GPU:
        yield
        return
    training_step = sft.SFTTrainer.training_step

    def limited(self: Any, policy: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if len(inputs["input_ids"]) > ROOM_ROWS:
            raise torch.OutOfMemoryError("out of memory (simulated: no GPU here)")
        return training_step(self, policy, inputs, num_items_in_batch)

    sft.SFTTrainer.training_step = limited
    try:
        yield
    finally:
        sft.SFTTrainer.training_step = training_step


def bf16_tflops() -> float:
    """The bf16 rate of this card (of this CPU): the best of a few large products, TFLOP/s."""
    device, wide = ("cuda", 8192) if ON_GPU else ("cpu", 512)
    matrix = torch.randn(wide, wide, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        matrix @ matrix
        if ON_GPU:
            torch.cuda.synchronize()
        best = max(best, 2 * wide**3 / (time.perf_counter() - started) / 1e12)
    return best


def allocator() -> dict[str, Any]:
    """What was asked for, and what the allocator made of it."""
    from toolkit import env

    return {**env.require_prepared().to_dict(), "effective": vram.allocator_settings()}
