"""What sharing prompts and cutting by tokens are worth in DPO: stock batching against ours, the same pairs and model.

    python benchmarks/dpo_speed.py [--rounds 5] [--out results.json]    a 6-layer, 512-wide Llama in NF4, on a CPU
    python benchmarks/dpo_speed.py --recipe llama31_8b ...              its architecture with random weights, on a GPU

An optimizer step's forward and backward over one effective batch of pairs is timed, plan after plan within a round, in
one process. Every plan has the reference's log-probs already, so each pair's reference costs one forward pass on top.
`stock N` is TRL's own step over N pairs at a time, in the rows' order, each micro-batch padded to its longest sequence;
`padded` and `shared` are ours by tokens. Losses and gradients are held against those of `stock 1`.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.card.rows import pair_lengths as drawn_lengths  # noqa: E402
from toolkit import env, hardware  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402
from toolkit.recipe.schema import Architecture, Recipe  # noqa: E402

SMALL = Architecture(
    num_hidden_layers=6,
    hidden_size=512,
    intermediate_size=1792,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=8192,
    head_dim=64,
)
STOCK = (1, 2, 4, 8)  # pairs at a time: the best for it, Unsloth's notebook, Unsloth's default, TRL's default
PAIRS = 8
TOKENS = 4096
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="whose architecture; without it the small one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    architecture = load(arguments.recipe).model.architecture if arguments.recipe else SMALL
    here = hardware.here()
    env.prepare(load("tiny").memory.alloc_conf, use_gpu=here.gpu is not None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(Path(folder), architecture)
        found = {
            name: measure(trainer, rows, arguments.rounds)
            for name, rows in row_sets(architecture.vocab_size).items()
        }
    result = {
        "device": here.gpu.name if here.gpu else f"{here.cpu_count} CPU cores",
        "pairs": PAIRS,
        "tokens": TOKENS,
        "sets": found,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, plans in found.items():
        show(name, plans)


def row_sets(vocabulary: int) -> dict[str, Rows]:
    """Pairs of one length, and pairs whose lengths are drawn as a public set's run, each part cut at 512 tokens."""
    draw = random.Random(0)

    def drawn() -> tuple[int, int, int]:
        prompt, chosen, rejected = (max(2, min(512, round(tokens))) for tokens in drawn_lengths(draw))
        return prompt, chosen, rejected

    def rows(lengths: list[tuple[int, int, int]]) -> Rows:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [
            {
                name: [draw.randrange(8, vocabulary) for _ in range(length)]
                for name, length in zip(names, one, strict=True)
            }
            | {"ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0}
            for one in lengths
        ]

    return {
        "256+64+64": rows([(256, 64, 64)] * PAIRS),
        "mixed lengths": rows([drawn() for _ in range(PAIRS)]),
    }


def build(folder: Path, architecture: Architecture) -> Any:
    """The toolkit's DPO trainer on random weights, its reference adapter dropped."""
    from datasets import Dataset
    from rich.console import Console
    from trl import DPOConfig

    from benchmarks.card import random_base
    from toolkit.engine.base import model, oom
    from toolkit.engine.train.dpo import TokenisedDPOTrainer
    from toolkit.memory.phases import Settings
    from toolkit.training import trainer_args

    base = folder / "base"
    random_base.build(base, architecture, ROOT / "recipes/tiny/base")
    settings = Settings(PAIRS, 1, 0, 0.5, TOKENS)
    recipe = with_base(base, architecture)
    loaded = model.load(recipe, 2048, settings)
    model.attach_lora(loaded, recipe, settings, 2048)
    some = Dataset.from_list(row_sets(architecture.vocab_size)["256+64+64"][:2])
    with model.keep_float32(loaded.model):
        trainer = TokenisedDPOTrainer(
            model=loaded.model,
            ref_model=None,
            args=DPOConfig(**trainer_args.dpo(recipe, settings, folder)),
            train_dataset=some,
            processing_class=loaded.tokenizer,
            recovery=oom.Recovery(folder / "events.jsonl", Console(quiet=True)),
        )
    trainer.precompute_ref_logps = True
    trainer.model.delete_adapter("ref")
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def with_base(base: Path, architecture: Architecture) -> Recipe:
    recipe = load("tiny", (f"model.path={base}", "dpo.max_length=2048"))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"architecture": architecture})})


def measure(trainer: Any, rows: Rows, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds a pair (median), tokens a pair through the model, peak GiB on a GPU, distance from stock 1, by plan."""
    import torch

    from toolkit.engine.base.micro_batches import MicroBatches, pair_lengths, row_tokens
    from toolkit.engine.shared_prompt.hooks import SharedPrompts, TreeCollator, installed

    padded = getattr(trainer.data_collator.collator, "collator", trainer.data_collator.collator)
    if installed(trainer.model) is None:
        SharedPrompts(trainer.model, 2048)
    plans = {f"stock {count}": (count, MicroBatches(), padded) for count in STOCK}
    plans |= {
        "padded": (PAIRS, MicroBatches(TOKENS), padded),
        "shared": (PAIRS, MicroBatches(TOKENS, shares_prompts=True), TreeCollator(padded)),
    }

    def step(name: str) -> tuple[float, list[torch.Tensor]]:
        count, trainer.micro_batches, trainer.data_collator.collator = plans[name]
        trainer.model.train()
        trainer.model.zero_grad(set_to_none=True)
        synchronise()
        started = time.perf_counter()
        loss = 0.0
        for start in range(0, len(rows), count):
            batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + count]))
            trainer.current_gradient_accumulation_steps = len(rows) // count
            loss += trainer.training_step(trainer.model, batch).item()
        synchronise()
        seconds = time.perf_counter() - started
        return seconds, [torch.tensor(loss)] + [
            p.grad.detach().float().flatten() for p in trainer.model.parameters() if p.grad is not None
        ]

    def tokens(name: str) -> int:
        count, cut, _ = plans[name]
        total, left = 0, cut.ordered(rows)
        while left:
            size = cut.first(left, len(left)) if cut.tokens else count
            some, left = left[:size], left[size:]
            longest = 2 * len(some) * max(map(row_tokens, some))
            total += sum(sum(pair_lengths(row)) for row in some) if cut.shares_prompts else longest
        return total

    seconds: dict[str, list[float]] = {name: [] for name in plans}
    peaks, kept = {}, {}
    step("stock 8")  # warms up
    for _ in range(rounds):
        for name in plans:
            reset_peak()
            took, kept[name] = step(name)
            seconds[name].append(took)
            print(f"{name}: {took:.1f} s a step of {len(rows)} pairs", file=sys.stderr, flush=True)
            peaks[name] = peak_gib()
    stock_loss, *stock = kept["stock 1"]
    norm = torch.cat(stock).norm()
    return {
        name: {
            "seconds_a_pair": statistics.median(seconds[name]) / len(rows),
            "fastest_a_pair": min(seconds[name]) / len(rows),
            "tokens_a_pair": tokens(name) / len(rows),
            "peak_gib": peaks[name],
            "loss_difference": abs((kept[name][0] - stock_loss).item()),
            "gradient_difference": ((torch.cat(kept[name][1:]) - torch.cat(stock)).norm() / norm).item(),
        }
        for name in plans
    }


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / hardware.GIB if torch.cuda.is_available() else None


def show(name: str, plans: dict[str, dict[str, float]]) -> None:
    best = min(plans[f"stock {count}"]["seconds_a_pair"] for count in STOCK)
    print(f"\n{name}: {PAIRS} pairs a step")
    print("plan      ms/pair  tokens/pair  of the best stock  loss off   gradients off  peak GiB")
    for plan, found in plans.items():
        print(
            f"{plan:9} {found['seconds_a_pair'] * 1000:7.1f}  {found['tokens_a_pair']:11.0f}  "
            f"x{best / found['seconds_a_pair']:16.2f}  {found['loss_difference']:.1e}  "
            f"{found['gradient_difference']:13.1e}  {found['peak_gib'] or math.nan:8.2f}"
        )


if __name__ == "__main__":
    main()
