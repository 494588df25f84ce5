"""How training scales over processes: measured with one and two on cores of their own, computed for 2 to 64 cards.

    python benchmarks/scaling.py [--steps 40] [--rounds 3] [--out results.json]

Measured: SFT of the recipe tiny at an effective batch of 64, one process pinned to one core against two on one each,
alternating; the time of a step is the median between two logs of the first process. Efficiency is t1 / (2 t2).
Computed: a step of a large recipe at the card's full rate, its part of the batch, and the gradients once around a ring
(memory.plan.Sharing); what it leaves out is printed with it. It stands for no measurement.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.cards import CARDS  # noqa: E402
from toolkit.memory.plan import LINKS, plan_stage  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402

EFFECTIVE, SKIPPED = 64, 5  # rows of a step; steps at the start that do not count
RECIPE, STAGE, CARD, RAM_GIB = "llama31_8b", "sft", "rtx4090", 64.0
WORLDS = (2, 4, 8, 16, 32, 64)
HOP_SECONDS = 20e-6  # of each of a ring's 2 (n - 1) messages: an assumption
ASSUMPTIONS = (
    f"{STAGE} of {RECIPE} on {CARD}, rows of full length, the card at its full rate (no run is faster, so the real "
    "share of sharing is smaller)",
    f"gradients in fp32 summed once a step in a ring, after the backward pass and not beside it, {1e6 * HOP_SECONDS:g} "
    "us a message",
    "links at their full rate, the same between all cards; no slower machine, no reading of rows, no evaluation or "
    "checkpoint, equal tokens for each card",
    "weak scaling: the effective batch grows with the cards, as the recipe has it for one; strong: it stays, while a "
    "card has a row",
)


def measure(size: int, steps: int, runs: Path) -> float:
    """Median seconds of a step of `size` processes, each on a core of its own."""
    settings = (
        f"sft.max_steps={steps}",
        f"sft.effective_batch_size={EFFECTIVE}",
        "sft.logging_steps=1",
        "sft.save_steps=100000",
        "sft.eval_datasets=[]",
        "sft.max_rows=null",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable,
        str(ROOT / "run_sft.py"),
        "--recipe",
        "tiny",
        "--runs",
        str(runs),
        "--quiet",
        *words,
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, core in zip(range(size), sorted(os.sched_getaffinity(0)), strict=False):
        world = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_PORT": port,
        }
        environ = {name: str(value) for name, value in world.items()} if size > 1 else {}
        environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                ["taskset", "-c", str(core), *command],
                cwd=ROOT,
                env={**os.environ, **environ},
                stdout=subprocess.DEVNULL,
            )
        )
    if any(process.wait() for process in processes):
        sys.exit(f"{size} processes did not finish; see {runs}")
    logged = map(json.loads, (runs / "tiny/sft/metrics.jsonl").read_text().splitlines())
    steps_logged = [line for line in logged if "tokens_per_second" in line]
    seconds = [
        (line["num_tokens"] - before["num_tokens"]) / line["tokens_per_second"]
        for before, line in itertools.pairwise(steps_logged)
    ]
    return statistics.median(seconds[SKIPPED:])


def computed() -> list[dict[str, float]]:
    """Efficiency against one card, by number of cards and kind of link."""
    recipe = load(RECIPE)
    one = plan_stage(recipe, STAGE, CARDS[CARD], RAM_GIB)
    assert one.floor_seconds_per_1000_steps
    alone, rows = one.floor_seconds_per_1000_steps / 1000, recipe.section(STAGE).effective_batch_size
    found = []
    for size in WORLDS:
        larger = recipe.with_values({f"{STAGE}.effective_batch_size": rows * size})
        sharing = plan_stage(larger, STAGE, CARDS[CARD], RAM_GIB, processes=size).sharing
        assert sharing
        line: dict[str, float] = {"cards": size, "bytes_per_step": sharing.bytes_per_step}
        for link in LINKS:
            spent = sharing.seconds[link] + 2 * (size - 1) * HOP_SECONDS
            line[f"weak, {link}"] = alone / (alone + spent)
            if size <= rows:
                line[f"strong, {link}"] = alone / size / (alone / size + spent)
        found.append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two processes on a core each need two cores")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            times = {
                size: measure(size, arguments.steps, Path(folder) / f"{number}-{size}") for size in (1, 2)
            }
            rounds.append({"one": times[1], "two": times[2], "efficiency": times[1] / (2 * times[2])})
            print(json.dumps(rounds[-1]), flush=True)
    efficiency = statistics.median(one["efficiency"] for one in rounds)
    print(
        f"two processes, {EFFECTIVE} rows a step: efficiency {efficiency:.3f} (median of {len(rounds)} rounds)"
    )
    print("computed, not measured:", *ASSUMPTIONS, sep="\n  ")
    lines = computed()
    for line in lines:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in line.items() if "," in name)
        print(f"  {line['cards']:2} cards: {line['bytes_per_step'] / 1e6:.0f} MB a step; efficiency {shown}")
    if arguments.out:
        found = {"efficiency": efficiency, "rounds": rounds, "computed": lines, "assumptions": ASSUMPTIONS}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
