"""What the toolkit costs over a bare Unsloth + TRL script: the same rows, model and steps, alternating.

    python benchmarks/overhead.py [--steps 60] [--rounds 5] [--out results.json]

Prints the ratio toolkit / bare of training time per step, of total wall time and of total CPU time, which other work
on the machine changes less: medians over the rounds. Whole processes are timed, with imports, loading, data
preparation, saving, answers and the report. Aim: at most 1.03 per step, 1.08 of the whole.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer  # noqa: E402

from toolkit.data.masking import Masking, TokenizedChat  # noqa: E402
from toolkit.data.rows import to_messages  # noqa: E402
from toolkit.data.template import ChatTemplate, read_template  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402


def write_rows(file: Path) -> Path:
    """The tiny recipe's SFT rows as the toolkit tokenises them. Returns the folder of the base model."""
    recipe = load("tiny")
    assert recipe.sft
    base = Path(recipe.locate(recipe.model.path))
    template = ChatTemplate(
        read_template(recipe.locate(recipe.template.file)), "<|begin_of_text|>", "<|end_of_text|>"
    )
    masking = Masking(
        Tokenizer.from_file(str(base / "tokenizer.json")),
        template,
        recipe.template.end_of_turn,
        recipe.sft.max_length,
    )
    lines = Path(recipe.locate(recipe.sft.datasets[0].path)).read_text(encoding="utf-8").split("\n")
    chats = masking.chats([to_messages(json.loads(line), "sharegpt") for line in lines if line])
    rows = [
        {"input_ids": chat.input_ids, "labels": chat.labels}
        for chat in chats
        if isinstance(chat, TokenizedChat)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


def run_bare(base: Path, rows: Path, steps: int, out: Path) -> dict[str, float]:
    return _timed([sys.executable, str(ROOT / "benchmarks/bare_sft.py"), base, rows, steps, out])


def run_toolkit(steps: int, out: Path) -> dict[str, float]:
    settings = (
        f"sft.max_steps={steps}",
        "sft.save_steps=100000",
        "sft.eval_datasets=[]",
        "sft.group_by_length=false",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    seconds = _timed([sys.executable, ROOT / "run_sft.py", "--recipe", "tiny", "--runs", out, *overrides])
    metrics = [json.loads(line) for line in (out / "tiny/sft/metrics.jsonl").read_text().splitlines()]
    seconds["train_seconds"] = next(entry["train_runtime"] for entry in metrics if "train_runtime" in entry)
    return seconds


def _timed(command: list[object]) -> dict[str, float]:
    started, before = time.perf_counter(), os.times()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stdout}\n{done.stderr}")
    last = done.stdout.strip().splitlines()[-1]
    return {**(json.loads(last) if last.startswith("{") else {}), "wall_seconds": wall, "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        base = write_rows(Path(folder) / "rows.jsonl")
        for number in range(arguments.rounds):
            here = Path(folder) / str(number)
            pair = {
                "bare": run_bare(base, Path(folder) / "rows.jsonl", arguments.steps, here / "bare"),
                "toolkit": run_toolkit(arguments.steps, here / "toolkit"),
            }
            rounds.append(pair)
            print(json.dumps(pair), flush=True)
    ratios = {
        key: statistics.median(pair["toolkit"][key] / pair["bare"][key] for pair in rounds)
        for key in ("train_seconds", "wall_seconds", "cpu_seconds")
    }
    print(
        f"toolkit / bare: {ratios['train_seconds']:.3f} per step, {ratios['wall_seconds']:.3f} of wall time, "
        f"{ratios['cpu_seconds']:.3f} of CPU time"
    )
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"steps": arguments.steps, "ratios": ratios, "rounds": rounds}, indent=2)
        )


if __name__ == "__main__":
    main()
