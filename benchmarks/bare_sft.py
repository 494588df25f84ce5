"""The yardstick of overhead.py: SFT with nothing but Unsloth and TRL, on rows that are already tokenised.

python benchmarks/bare_sft.py BASE ROWS.jsonl STEPS OUT
"""

import json
import sys
import time
from pathlib import Path

started = time.perf_counter()
from unsloth import FastLanguageModel  # noqa: E402, I001  first, as Unsloth asks

from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

base, rows, steps, out = sys.argv[1:5]
model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing=False,
    random_state=3407,
)
config = SFTConfig(
    output_dir=out,
    max_steps=int(steps),
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    optim="adamw_torch_fused",
    logging_steps=20,
    save_strategy="no",
    gradient_checkpointing=False,
    report_to="none",
    seed=3407,
    data_seed=3407,
    dataset_kwargs={"skip_prepare_dataset": True},
)
dataset = Dataset.from_list([json.loads(row) for row in Path(rows).read_text().split("\n") if row])
trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()  # or TRL trains the LoRA of a 4-bit model in bf16
result = trainer.train()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
print(
    json.dumps(
        {"train_seconds": result.metrics["train_runtime"], "wall_seconds": time.perf_counter() - started}
    )
)
