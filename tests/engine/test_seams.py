"""What our code relies on in Unsloth's GPU path, which no CPU can run: read from the installed sources.

A test fails when a new version moves one of these, and its message says what then has to be looked at.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import env


def source(path: str) -> str:
    """A file of an installed package, found without importing it."""
    package, _, rest = path.partition("/")
    found = importlib.util.find_spec(package)
    assert found and found.origin
    return (Path(found.origin).parent / rest).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "holds", "then"),
    [
        (
            "unsloth_zoo/fused_losses/fused_linear.py",
            rf'_CHUNK_GB = _env_float\("{env.LOSS_CHUNK_VARIABLE}"',
            "memory.loss_chunk_gib reaches nothing: look for the variable's new name in toolkit/env.py",
        ),
        (
            "unsloth_zoo/fused_losses/cross_entropy_loss.py",
            r"if not _CHUNKED_CE or target_gb is not None or TARGET_GB or N_CHUNKS:\n\s+return False",
            "SFT's loss may take another path, and with it other memory: toolkit/memory/phases.py",
        ),
        (
            "unsloth/models/_block_compile.py",
            r'os\.environ\.get\("UNSLOTH_BLOCK_COMPILE", "1"\) != "0"',
            "memory.compile reaches nothing: toolkit/env.py",
        ),
        (
            "unsloth_zoo/tokenizer_utils.py",
            r"def fix_untrained_tokens\(model, tokenizer, train_dataset, .*eps = 1e-16\)",
            "Unsloth's own check of untrained tokens has changed: hold ours against it, toolkit/engine/base/tokens.py",
        ),
        (
            "unsloth/models/llama.py",
            r"_flag_for_generation",
            "model.train() may no longer be what training's forward is: toolkit/engine/reference/precompute.py",
        ),
        (
            "unsloth_zoo/gradient_checkpointing.py",
            r"def reset_unsloth_gradient_checkpointing_buffers",
            "after an out-of-memory error Unsloth's buffers are no longer reset: toolkit/engine/base/oom.py",
        ),
        (
            "unsloth_zoo/__init__.py",
            r"PYTORCH_ALLOC_CONF",
            "the allocator's variable may be set otherwise at import: toolkit/env.py",
        ),
        (
            "unsloth/models/llama.py",
            r"if num_labels is not None:[\s\S]*AutoModelForSequenceClassification\.from_pretrained",
            "models with a score may be loaded otherwise on a GPU: toolkit/engine/base/score_head.py",
        ),
        (
            "unsloth/models/llama.py",
            r"freeze_peft_variant_weights\(model\)\n\s+_unfreeze_modules_to_save\(model\)",
            "the score may stay frozen on a GPU: toolkit/engine/base/score_head.py asserts that it is trained",
        ),
        (
            "unsloth_zoo/cpu/loader.py",
            r"def _disable_bnb_cpu_weight_packing[\s\S]*"
            r"model = AutoModelForCausalLM\.from_pretrained",
            "the CPU backend may know models with a score: toolkit/engine/base/score_head.py",
        ),
        (
            "unsloth/models/loader.py",
            r"offload_embedding = OFFLOAD_EMBEDDING_AUTO,",
            "the embedding may stay on the card by itself: model.load need not ask for it",
        ),
        (
            "unsloth/models/_utils.py",
            r'"_unsloth_offload_embedding_mode", _OFFLOAD_EMBEDDING_AUTO\) is False:\n\s+return False',
            "offload_embedding=False may not keep the embedding on the card any more: engine/base/model.py, load",
        ),
        (
            "unsloth/models/llama.py",
            r"input_ids = input_ids\[:, : self\.max_seq_length\]",
            "longer inputs may not be cut by Unsloth any more: LoadedModel.max_length, engine/base/model.py",
        ),
        (
            "unsloth/models/llama.py",
            r"self\.training\s+and not getattr\(self, \"_unsloth_keep_padding_mask\", False\)",
            "training may keep the padding mask: it ran another forward than evaluation because it dropped it "
            "(reference/precompute.py, forward_of)",
        ),
        (
            "unsloth/models/llama.py",
            r"if gradient_checkpointing and not isinstance\(decoder_layer, GradientCheckpointingLayer\)",
            "a layer's own flag may not decide any more whether it recomputes: engine/base/recompute.py",
        ),
        (
            "unsloth/models/llama.py",
            r"logits = EMPTY_LOGITS",
            "the fused loss of a GPU may return logits: a token accuracy would cost nothing more (docs/runs.md)",
        ),
        (
            "unsloth_zoo/fused_losses/fused_linear.py",
            r"_MAX_ROWS = .*4096(.|\n)*return 0 if total <= _SMALL_CARD_BYTES else 4096",
            "the head's rows at once may be others: memory/terms.py, logit_bytes; benchmarks/card/place.py pins "
            "UNSLOTH_FUSED_LINEAR_FLASH_MIN_ROWS",
        ),
        (
            "unsloth/utils/attention_dispatch.py",
            r"if HAS_XFORMERS and not \(\n\s+use_varlen",
            "dense batches may take another attention: the plan counts expanded keys and values where xFormers is "
            "installed (memory/phases.py), benchmarks/card/trials.py switches it by HAS_XFORMERS",
        ),
        (
            "unsloth/utils/packing.py",
            r'mask_packed_boundary_labels\(labels, batch\["packed_seq_lengths"\]\)',
            "packed rows may no longer be kept apart by their seq_lengths: engine/train/sft.py, packed",
        ),
        (
            "unsloth_zoo/training_utils.py",
            r'if \("\.lora_A\." in name(.|\n)*else:\n\s+requires_grad = False',
            "rows of lora.trainable_tokens may be trained on a GPU too: look whether process.py can let them through",
        ),
        (
            "trl/trainer/dpo_trainer.py",
            r'if "\.default\." in name:\n\s+ref_name',
            "TRL may copy the rows of trained tokens into the reference itself: engine/base/token_rows.py, copy",
        ),
        (
            "trl/trainer/utils.py",
            r"weight, bias = lm_head\.weight, lm_head\.bias",
            "the head need not have a bias of its own beside trained rows: engine/base/token_rows.py, begin",
        ),
        (
            "trl/trainer/dpo_trainer.py",
            r'model\.add_adapter\("ref"',
            "the reference may no longer be a copy of the policy's adapter: toolkit/engine/reference/proof.py",
        ),
    ],
)
def test_a_seam_is_where_it_was(file: str, holds: str, then: str) -> None:
    assert re.search(holds, source(file)), f"{file} has moved: {then}"


GENERATE = """
import inspect, json, sys
import unsloth
from unsloth.models import rl
rl.patch_trl_rl_trainers()
import trl
names = ("SFTTrainer", "DPOTrainer", "RewardTrainer")
print(json.dumps({name: inspect.getsourcefile(getattr(trl, name)) for name in names}))
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The trainers that Unsloth writes for a GPU, made on a CPU in a process of its own."""
    folder = tmp_path_factory.mktemp("compiled")
    variables = os.environ | {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": str(folder)}
    variables.pop("UNSLOTH_FORCE_CPU", None)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    files = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}


@pytest.mark.long
def test_the_trainers_that_unsloth_generates_for_a_gpu(generated: dict[str, str]) -> None:
    sft, dpo = generated["SFTTrainer"], generated["DPOTrainer"]
    assert "rewards_chosen - rewards_rejected" in generated["RewardTrainer"], "its loss is another than TRL's"
    for name, text in generated.items():
        for attribute in ("self._total_train_tokens = 0", "self._metrics = {"):
            assert attribute in text, f"{name} has no {attribute}: toolkit/engine/train/pieces.py reads it"
    assert "fix_untrained_tokens(" in sft, (
        "Unsloth looks at untrained tokens no more: engine/base/tokens.py stays"
    )
    loss = sft.partition("    def compute_loss(")[2].partition("\n    def ")[0]
    assert loss and "_total_train_tokens" not in loss, "Unsloth counts tokens: pieces.py need not"
    assert ".for_inference()" in dpo, (
        "the reference pass need not leave inference mode: precompute.forward_of"
    )
    assert 'model.add_adapter("ref"' in dpo, (
        "the reference is no copy of the policy's adapter: reference/proof.py"
    )
