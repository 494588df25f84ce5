"""What needs no process of its own: trials on one loaded model, asked for and answered line by line, in JSON.

python benchmarks/card/trials.py RECIPE BASE
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from toolkit import env, hardware  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402

RECIPE, BASE = sys.argv[1:3]
OWN = ("gpu=null", f"model.path={json.dumps(BASE)}", "model.revision=null", "model.base_16bit=null")
env.prepare(load(RECIPE).memory.alloc_conf, use_gpu=hardware.here().gpu is not None)

from toolkit.engine.base import model, oom, recompute, vram  # noqa: E402, I001
from toolkit.engine.data.preparation import Prepared  # noqa: E402
from toolkit.engine.reference.first_step import FirstStep  # noqa: E402
from toolkit.engine.train import dpo, sft  # noqa: E402

import torch  # noqa: E402  the engine imports unsloth, which must come before these
from datasets import Dataset  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402

from toolkit.hardware import GIB  # noqa: E402
from toolkit.memory.plan import Settings, plan_stage  # noqa: E402
from toolkit.run.rundir import RunDir  # noqa: E402
from toolkit.training.job import Job  # noqa: E402

ON_GPU = torch.cuda.is_available()
BUILD = {"sft": sft.build, "dpo": dpo.build}
SHORT_ROWS = 4  # in a packed sequence
ATTENTION_ROUNDS, ATTENTION_STEPS, ATTENTION_TOKENS = 3, 3, 2048
ATTENTION_MODULE = "unsloth.utils.attention_dispatch"


class Clock(TrainerCallback):
    """Seconds of each optimizer step but the first, which also makes the optimizer's states."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = _now()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


class Bench:
    """One base model with one LoRA; each trial trains it a few steps on rows of an exact length."""

    def __init__(self, folder: Path):
        self._folder, self._console = folder, Console(quiet=True)
        recipe = load(RECIPE, OWN)
        layers = recipe.model.architecture.num_hidden_layers
        longest = max(recipe.section(stage.name).max_length for stage in recipe.stages())
        self._loaded = model.load(recipe, longest, Settings(1, 1, layers, 0.5))
        model.attach_lora(self._loaded, recipe, Settings(1, 1, layers, 0.5), longest)

    def point(self, stage: str, settings: list[str], steps: int) -> dict[str, Any]:
        """Peak memory and seconds a step with what the settings pin."""
        recipe = load(RECIPE, (*settings, *OWN))
        plan = plan_stage(recipe, stage, None, hardware.here().ram_gib)
        job = Job(recipe, plan, RunDir(self._folder, recipe.name, stage), self._console)
        job.run.path.mkdir(parents=True, exist_ok=True)
        chunk_logits(plan.settings.loss_chunk_gib)
        packs = stage == "sft" and recipe.sft is not None and recipe.sft.packing
        count = steps * job.section.effective_batch_size
        given = rows(stage, count, job.section.max_length, SHORT_ROWS if packs else 1)
        trainer, clock = BUILD[stage](job, self._loaded, Prepared(given, None, None)), Clock()  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(FirstStep)  # random weights: what it looks at, the baseline's run tells
        trainer.add_callback(recompute.Recompute(plan.settings.recompute_layers))
        trainer.add_callback(clock)
        oom.free_memory()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        started = _now()
        trainer.train()
        measured = {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if ON_GPU else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if ON_GPU else None,
            "step_seconds": clock.seconds or [(_now() - started) / steps],
            "steps": trainer.state.global_step,
            "events": trainer.recovery.events,
        }
        # accelerate wrapped the model's forward; the next trainer shall not wrap it once more
        trainer.accelerator.unwrap_model(self._loaded.model, keep_fp32_wrapper=False)
        self._loaded.model.zero_grad(set_to_none=True)
        return measured

    def attention(self) -> dict[str, Any]:
        """Seconds of a dense step with either attention, alternating; xFormers' only where it loads."""
        dispatch = sys.modules.get(ATTENTION_MODULE)
        kinds = (
            {"xformers": True, "sdpa": False} if getattr(dispatch, "HAS_XFORMERS", False) else {"sdpa": False}
        )
        tokens = min(ATTENTION_TOKENS, load(RECIPE).section("sft").max_length)
        pinned = [
            *(
                "sft.packing=false",
                "sft.effective_batch_size=1",
                f"sft.max_length={tokens}",
                "sft.eval_rows=0",
            ),
            *("sft.eval_datasets=[]", "memory.recompute_layers=all", "memory.per_device_train_batch_size=1"),
        ]
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ATTENTION_ROUNDS):
            for kind, takes_xformers in kinds.items():
                if dispatch is not None:
                    dispatch.HAS_XFORMERS = takes_xformers  # type: ignore[attr-defined]
                settings = [*pinned, f"sft.max_steps={ATTENTION_STEPS}"]
                seconds[kind] += self.point("sft", settings, ATTENTION_STEPS)["step_seconds"]
        return {"step_seconds": seconds, "tokens": tokens}

    def bf16(self) -> dict[str, Any]:
        """The bf16 rate of this card (of this CPU): the best of a few large products, TFLOP/s."""
        device, wide = ("cuda", 8192) if ON_GPU else ("cpu", 512)
        matrix = torch.randn(wide, wide, device=device, dtype=torch.bfloat16)
        best = 0.0
        for _ in range(8):
            started = _now()
            matrix @ matrix
            best = max(best, 2 * wide**3 / (_now() - started) / 1e12)
        return {"tflops": best, "allocator": vram.allocator_settings()}


def rows(stage: str, count: int, tokens: int, parts: int) -> Dataset:
    """`count` rows (pairs) of exactly `tokens` tokens, or `parts` shorter ones in place of each; of a pair the first
    half is the prompt."""
    count, tokens = count * parts, tokens // parts
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


def chunk_logits(gib: float) -> None:
    """As env.prepare does before the import: unsloth_zoo fused_losses/fused_linear.py, which no CPU loads."""
    fused = sys.modules.get("unsloth_zoo.fused_losses.fused_linear")
    if fused is not None:
        fused._CHUNK_GB = gib  # type: ignore[attr-defined]
        for cached in ("_budget_bytes", "_get_chunk_multiplier"):
            getattr(getattr(fused, cached, None), "cache_clear", lambda: None)()


def _now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for request in requests():
            try:
                answer = getattr(bench, request.pop("what"))(**request)
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
