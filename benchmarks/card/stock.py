"""The yardstick for speed: Unsloth's own notebooks as one plain script, nothing of the toolkit in it.

SFT as in "Llama3.1_(8B)-Alpaca", packed where the recipe packs; DPO as in "Zephyr_(7B)-DPO" (unslothai/notebooks).

python benchmarks/card/stock.py STAGE BASE ROWS.jsonl MAX_LENGTH EFFECTIVE STEPS PACKING PAD_TOKEN OUT
"""

import json
import sys
import time
from pathlib import Path

# First, as Unsloth asks. PatchDPOTrainer, which the notebook calls, does nothing in this version.
from unsloth import FastLanguageModel

# isort: split
import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

MICRO_BATCH = 2  # rows (pairs) at once, as both notebooks have it
ON_GPU = torch.cuda.is_available()


class Steps(TrainerCallback):
    """Seconds and tokens, padding left out, of each optimizer step."""

    def __init__(self):
        self.seconds, self.tokens = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.tokens.append(0)
        self._started = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self._started)


def _now():
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def counted(trainer_class, steps):
    class Counted(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            fed = (
                inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            )
            steps.tokens[-1] += int(fed)
            return super().training_step(model, inputs, *args, **kwargs)

    return Counted


def main():
    stage, base, rows, max_length, effective, num_steps, packing, pad_token, out = sys.argv[1:]
    model, tokenizer = FastLanguageModel.from_pretrained(
        base, max_seq_length=int(max_length), dtype=None, load_in_4bit=True
    )
    tokenizer.pad_token = pad_token
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    micro = min(MICRO_BATCH, int(effective))
    arguments = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": int(effective) // micro,
        "max_steps": int(num_steps),
        "max_length": int(max_length),
        "logging_steps": 1,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output_dir": str(Path(out).with_suffix("")),
        "save_strategy": "no",
        "report_to": "none",
    }
    dataset, steps = load_dataset("json", data_files=rows, split="train"), Steps()
    if stage == "sft":
        config = SFTConfig(
            **arguments,
            learning_rate=2e-4,
            warmup_steps=5,
            dataset_text_field="text",
            packing=packing == "True",
        )
        trainer = counted(SFTTrainer, steps)(
            model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[steps]
        )
    else:
        config = DPOConfig(**arguments, learning_rate=5e-6, warmup_steps=0.1, beta=0.1)
        trainer = counted(DPOTrainer, steps)(
            model=model,
            ref_model=None,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[steps],
        )
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    figures = {
        "micro_batch": micro,
        "step_seconds": steps.seconds,
        "step_tokens": steps.tokens,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if ON_GPU else None,
    }
    Path(out).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
