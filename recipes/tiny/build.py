"""Make everything the `tiny` recipe needs: a small pre-trained Llama, its tokenizer, and the rows.

    python recipes/tiny/build.py                        # all of it, into this folder; ~10 minutes on two cores
    python recipes/tiny/build.py --rows-only --out DIR  # all but the weights, elsewhere; a few seconds

The rows and the tokenizer come out byte for byte the same on every machine. The weights depend on the
order of floating-point sums, so another machine makes slightly different ones that know the same facts.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rows import dpo_rows, kto_rows, phrases, questions, sft_rows, split
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from world import Fact, make_facts, write_documents

HERE = Path(__file__).resolve().parent
SEED = 7
VOCAB_SIZE = 1792
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
# The names of Llama 3.1. As in its base model, a turn ends in <|eot_id|>, which is not the eos token.
SPECIAL_TOKENS = (
    BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", PAD, "<|python_tag|>",
)  # fmt: skip

BLOCK_TOKENS = 256
BATCH_BLOCKS = 16  # 4,096 tokens a step
PASSES = 760  # how often the prose says every fact
STEPS = 1000  # 4.1M tokens
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100


def world_pools() -> tuple[list[Fact], tuple[list[Fact], list[Fact], list[Fact]]]:
    facts = make_facts(SEED)
    return facts, split(facts, SEED + 1)


def write_rows(out: Path) -> None:
    """The eight JSONL files. No fact of `questions.jsonl` is asked in any of the others."""
    _, (train, held_out, measured) = world_pools()
    files = {
        "sft.jsonl": sft_rows(train, 1600, SEED + 2),
        "sft_eval.jsonl": sft_rows(held_out, 64, SEED + 3),
        "dpo.jsonl": dpo_rows(train, 640, SEED + 4),
        "dpo_eval.jsonl": dpo_rows(held_out, 96, SEED + 5),
        "kto.jsonl": kto_rows(train, 640, SEED + 7),
        "kto_eval.jsonl": kto_rows(held_out, 96, SEED + 8),
        "questions.jsonl": questions(measured, SEED + 6),
        "rl.jsonl": questions(train, SEED + 7),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text("".join(lines), encoding="utf-8", newline="\n")


def write_tokenizer(out: Path) -> Tokenizer:
    """A byte-level BPE over the world's prose and the rows' wordings, saved to `out/base`. It opens every
    text with <|begin_of_text|>, as Llama 3.1's does, and has no chat template."""
    facts, _ = world_pools()
    texts = write_documents(facts, passes=20, seed=SEED)
    texts += phrases() * 20
    tokenizer = Tokenizer(models.BPE())
    # A blank line is one piece, as in Llama 3.1, so a turn's header ends in the same token everywhere.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n+| ?\w+| ?[^\s\w]+|\s+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    (out / "base").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "base" / "tokenizer.json"))
    write_json(out / "base" / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
    })  # fmt: skip
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_config(out: Path, tokenizer: Tokenizer) -> LlamaConfig:
    """config.json and generation_config.json."""
    ids = {name: tokenizer.token_to_id(token) for name, token in
           (("bos_token_id", BOS), ("eos_token_id", EOS), ("pad_token_id", PAD))}  # fmt: skip
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,  # every linear is a whole number of NF4 blocks of 64
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(out / "base")
    GenerationConfig(do_sample=False, **ids).save_pretrained(out / "base")
    return config


def pack(documents: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """Documents end to end, each between its begin and end token, cut into blocks: (blocks, BLOCK_TOKENS)."""
    end = tokenizer.token_to_id(EOS)
    ids = [i for encoding in tokenizer.encode_batch(documents) for i in [*encoding.ids, end]]
    usable = len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
    return torch.tensor(ids[:usable]).view(-1, BLOCK_TOKENS)


def pretrain(config: LlamaConfig, blocks: torch.Tensor) -> LlamaForCausalLM:
    """Next-token training on the packed prose, once through."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP_STEPS)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, STEPS - WARMUP_STEPS, eta_min=LEARNING_RATE / 50
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP_STEPS])
    order = torch.randperm(len(blocks))
    started = time.perf_counter()
    for step in range(STEPS):
        batch = blocks[order[step * BATCH_BLOCKS : (step + 1) * BATCH_BLOCKS]]
        with torch.autocast("cpu", torch.bfloat16):  # half the time on a processor that multiplies bfloat16
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(
                f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True
            )
    redraw_unseen_rows(model, blocks)
    return model


def redraw_unseen_rows(model: LlamaForCausalLM, blocks: torch.Tensor) -> None:
    """Give the output rows of tokens that never occurred fresh random directions, as long as the others.

    The softmax pushes all of them the same way and keeps them short; LoRA cannot move them, and with only
    this many dimensions it could then never make <|eot_id|> the likeliest token.
    """
    rows = model.lm_head.weight.detach()
    unseen = torch.ones(len(rows), dtype=torch.bool)
    unseen[blocks.unique()] = False
    fresh = torch.randn(int(unseen.sum()), rows.shape[1])
    rows[unseen] = fresh / fresh.norm(dim=1, keepdim=True) * rows[~unseen].norm(dim=1).median()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows-only", action="store_true", help="everything but the weights")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write to (default: beside this script)"
    )
    arguments = parser.parse_args()
    write_rows(arguments.out)
    tokenizer = write_tokenizer(arguments.out)
    config = write_config(arguments.out, tokenizer)
    if arguments.rows_only:
        return
    facts, _ = world_pools()
    blocks = pack(write_documents(facts, passes=PASSES, seed=SEED), tokenizer)
    assert len(blocks) >= STEPS * BATCH_BLOCKS, f"{len(blocks)} blocks for {STEPS} steps: write more passes"
    pretrain(config, blocks).to(torch.bfloat16).save_pretrained(arguments.out / "base")
    write_config(arguments.out, tokenizer)  # once more: save_pretrained has written its own


if __name__ == "__main__":
    main()
