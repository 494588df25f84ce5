"""What the memory plan and the speed are worth: measured on this GPU, with Llama-3.1-8B's architecture.

    python benchmarks/gpu.py --out benchmarks/results/h200.json      at most 9 minutes; no download
    python benchmarks/gpu.py --tiny --out tiny.json                  the same path on a CPU, in seconds

(1) Peak memory of many settings against the plan: constants are fitted on half of the points, the error is told on
the other half. (2) The settings that the plan chooses against a stock Unsloth script on the same model, alternating.
(3) A micro-batch that cannot fit: out of memory for real, and recovered. (4) What the allocator took of its
settings. A second process holds the memory above 24 GB, so that Unsloth sees an RTX 4090's too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit import env, hardware  # noqa: E402
from toolkit.memory import terms  # noqa: E402
from toolkit.memory.plan import Plan, plan_stage  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402
from toolkit.recipe.schema import Recipe  # noqa: E402

MINUTES = 9
STAND_IN = hardware.CARDS["rtx4090"]
STEPS = 3  # of a point: the first one makes the optimizer's states, the later ones are timed
ROUNDS = 2
LIBRARIES = ("torch", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Size:
    """What is measured. A point is (stage, kept layers, rows or pairs at once, tokens a row, loss chunk in GiB)."""

    recipe: str
    points: tuple[tuple[str, int, int, int, float], ...]
    budget_gib: float | None
    steps: int
    timed_steps: int
    effective: int
    max_length: int
    too_many: int  # rows at once, with every layer kept: beyond any 24 GB card


FULL = Size(
    recipe="llama31_8b",
    points=(
        *(("sft", kept, rows, tokens, 0.5) for rows, tokens in ((2, 512), (1, 2048), (2, 2048), (1, 4096))
          for kept in (0, 8, 16, 32)),
        *(("sft", 0, 2, 2048, chunk) for chunk in (0.25, 1.0, 4.0)),
        *(("dpo", kept, rows, tokens, 0.5) for rows, tokens in ((1, 1024), (2, 1024), (1, 2048)) for kept in (0, 16)),
    ),
    budget_gib=None, steps=STEPS, timed_steps=4, effective=16, max_length=2048, too_many=8,
)  # fmt: skip
TINY = Size(
    recipe="tiny",
    points=(("sft", 0, 2, 16, 0.5), ("sft", 4, 2, 32, 0.5), ("dpo", 2, 1, 16, 0.5), ("dpo", 4, 1, 32, 0.25)),
    budget_gib=8.0, steps=1, timed_steps=2, effective=4, max_length=16, too_many=4,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="the tiny recipe's architecture, on any machine")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="points that do not fit in are left out"
    )
    parser.add_argument("--hold", type=float, help=argparse.SUPPRESS)  # the second process: GiB to leave free
    arguments = parser.parse_args()
    if arguments.hold is not None:
        return hold(arguments.hold)
    size = TINY if arguments.tiny else FULL
    if not arguments.tiny and hardware.here().gpu is None:
        sys.exit(f"no NVIDIA GPU here ({hardware.here().no_gpu}): --tiny runs the same path on a CPU")
    results: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])}
    try:
        measure(size, time.monotonic() + 60 * arguments.minutes, results)
    finally:  # a card costs money: what was measured until then is kept
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def measure(size: Size, deadline: float, results: dict[str, Any]) -> None:
    """Fills `results` in the order of worth; points that the deadline cuts off are missing from it."""
    started, machine = time.monotonic(), hardware.here()
    recipe = load(size.recipe, ("gpu=null",))
    env.prepare(recipe.memory.alloc_conf, use_gpu=machine.gpu is not None)
    results |= {
        "card": asdict(machine.gpu) if machine.gpu else None,
        "measured": machine.gpu is not None,
        "versions": {name: version(name) for name in LIBRARIES},
        "memory_held_to_gib": STAND_IN.total_gib if machine.gpu else None,
        "points": [],
    }
    holder = memory_held(STAND_IN.total_gib) if machine.gpu else contextlib.nullcontext()
    with holder, tempfile.TemporaryDirectory() as folder:
        from benchmarks import trials

        bench = trials.Bench(recipe, size.max_length, Path(folder))
        results["allocator"] = trials.allocator()
        results["bf16_tflops"] = trials.bf16_tflops()
        for number, point in enumerate(size.points):
            planned, pinned = plan_of(size, *point)
            if planned.fits and time.monotonic() < deadline - 180:  # what comes after takes three minutes
                measured = bench.point(pinned, point[0], planned.settings, size.steps)
                results["points"].append(describe(number, point, planned, measured))
        results["fit"] = fit(results["points"])
        results["recovery"] = recovery(bench, size)
        results["speed"] = speed(bench, size, deadline)
    results["seconds"] = time.monotonic() - started


def plan_of(size: Size, stage: str, kept: int, rows: int, tokens: int, chunk: float) -> tuple[Plan, Recipe]:
    """The plan of one point, for the stand-in card (for the RAM at tiny size), and the recipe that pins it."""
    layers = load(size.recipe).model.architecture.num_hidden_layers
    pinned = (
        f"memory.recompute_layers={layers - kept}",
        f"memory.per_device_train_batch_size={rows}",
        f"memory.loss_chunk_gib={chunk}",
        f"{stage}.effective_batch_size={rows}",
        f"{stage}.max_length={tokens}",
        f"{stage}.max_steps={size.steps}",
        "dpo.precompute_ref_batch_size=1",
    )
    recipe = load(size.recipe, (*without_evaluation(), *pinned))
    return plan_stage(recipe, stage, None if size.budget_gib else STAND_IN, size.budget_gib or 64), recipe


def without_evaluation() -> tuple[str, ...]:
    values = ("eval_steps=null", "eval_datasets=[]", "eval_rows=0", "logging_steps=1")
    return (
        "gpu=null",
        "sft.packing=false",
        *(f"{stage}.{value}" for stage in ("sft", "dpo") for value in values),
    )


def describe(number: int, point: tuple[Any, ...], planned: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    stage, kept, rows, tokens, chunk = point
    peak = measured["peak_gib"]
    return {
        "stage": stage, "kept_layers": kept, "rows": rows, "tokens_a_row": tokens, "loss_chunk_gib": chunk,
        "planned_gib": planned.peak_gib, "planned_items_gib": planned.items_gib,
        "error": None if peak is None else planned.peak_gib / peak - 1,
        "held_out": bool(number % 2),
        **measured,
    }  # fmt: skip


SCALED = (("activations_kept",), ("layer_backward", "recomputed_inputs"), ("loss",))


def fit(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Scales of three items and one constant, by least squares on every other point; errors on the held-out ones.

    None where too little was measured; a point that ran out of memory and recovered is none. An error is
    planned / measured - 1: below 0 the plan promised too little.
    """
    import numpy as np

    measured = [point for point in points if point["peak_gib"] is not None and not point["events"]]
    if len(measured) < 2 * (len(SCALED) + 1):
        return None

    def features(point: dict[str, Any]) -> list[float]:
        items = point["planned_items_gib"]
        return [*(sum(items[name] for name in names) for names in SCALED), 1.0]

    def fixed(point: dict[str, Any]) -> float:
        return point["planned_gib"] - sum(features(point)[:-1])

    training = [point for point in measured if not point["held_out"]]
    held_out = [point for point in measured if point["held_out"]]
    goal = [point["peak_gib"] - fixed(point) for point in training]
    scales, *_ = np.linalg.lstsq(
        np.array([features(point) for point in training]), np.array(goal), rcond=None
    )
    errors = [(fixed(p) + float(np.dot(features(p), scales))) / p["peak_gib"] - 1 for p in held_out]
    unfitted = [point["error"] for point in held_out]
    return {
        "scales": dict(zip(("+".join(names) for names in SCALED), scales.tolist(), strict=False)),
        "constant_gib": float(scales[-1]),
        "held_out_errors": errors,
        "worst_error": max(errors, key=abs),
        "worst_error_of_the_plan_as_it_is": max(unfitted, key=abs),
    }


def recovery(bench: Any, size: Size) -> dict[str, Any]:
    """A micro-batch of `too_many` rows with every layer kept: it must run out of memory, and finish."""
    recipe = load(
        size.recipe,
        (
            *without_evaluation(),
            "memory.recompute_layers=none",
            f"memory.per_device_train_batch_size={size.too_many}",
            f"sft.effective_batch_size={size.too_many}",
            f"sft.max_length={size.max_length}",
            "sft.max_steps=2",
        ),
    )
    settings = plan_stage(
        recipe, "sft", None if size.budget_gib else STAND_IN, size.budget_gib or 64
    ).settings
    return bench.out_of_memory(recipe, settings)


def speed(bench: Any, size: Size, deadline: float) -> dict[str, Any]:
    """Tokens per second of the toolkit's choice and of a stock script, alternating, median of the steps."""
    speeds: dict[str, Any] = {}
    for stage in ("sft", "dpo"):
        recipe = load(
            size.recipe,
            (
                *without_evaluation(),
                f"{stage}.effective_batch_size={size.effective}",
                f"{stage}.max_length={size.max_length}",
                f"{stage}.max_steps={size.timed_steps}",
            ),
        )
        plan = plan_stage(recipe, stage, None if size.budget_gib else STAND_IN, size.budget_gib or 64)
        seconds: dict[str, list[float]] = {"toolkit": [], "stock": []}
        for _ in range(ROUNDS):
            for who, run in (("toolkit", bench.point), ("stock", bench.stock)):
                if time.monotonic() < deadline - 30:
                    seconds[who] += run(recipe, stage, plan.settings, size.timed_steps)["step_seconds"]
        if all(seconds.values()):
            rates = {who: plan.tokens_per_step / statistics.median(times) for who, times in seconds.items()}
            speeds[stage] = {
                "settings": asdict(plan.settings),
                "step_seconds": seconds,
                "tokens_per_second": rates,
                "toolkit_over_stock": rates["toolkit"] / rates["stock"],
                "useful_tflops": rates["toolkit"]
                * terms.flops_per_token(recipe.model.architecture, 0)
                / 1e12,
            }
    return speeds


@contextlib.contextmanager
def memory_held(leave_gib: float) -> Iterator[None]:
    """A second process takes all of the card's memory but `leave_gib`, while the block runs."""
    command = [sys.executable, __file__, "--hold", str(leave_gib), "--out", "/dev/null"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout
        print(holder.stdout.readline().strip(), flush=True)
        try:
            yield
        finally:
            holder.stdin.close()


def hold(leave_gib: float) -> None:
    """The second process: allocates what is too much, says so, and waits for the end of its input."""
    import torch

    held = []
    if torch.cuda.is_available():
        while (room := torch.cuda.mem_get_info()[0] / hardware.GIB - leave_gib) > 0.01:
            held.append(torch.empty(int(min(room, 8) * hardware.GIB), dtype=torch.uint8, device="cuda"))
    print(f"{sum(block.numel() for block in held) / hardware.GIB:.1f} GiB held", flush=True)
    sys.stdin.read()
    del held
    gc.collect()


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def text(value: float | None, style: str) -> str:
        return "not measured" if value is None else style.format(value)

    console = Console()
    table = Table("stage", "kept", "rows x tokens", "chunk", "planned", "measured", "error", "s/step")
    for point in results["points"]:
        table.add_row(
            point["stage"] + ("" if point["held_out"] else " (fitted)"),
            str(point["kept_layers"]),
            f"{point['rows']} x {point['tokens_a_row']}",
            str(point["loss_chunk_gib"]),
            f"{point['planned_gib']:.2f}",
            text(point["peak_gib"], "{:.2f}"),
            text(point["error"], "{:+.1%}"),
            f"{statistics.median(point['step_seconds']):.3f}",
        )
    console.print(table)
    if results["fit"]:
        console.print(f"worst held-out error: {results['fit']['worst_error']:+.1%} fitted, "
                      f"{results['fit']['worst_error_of_the_plan_as_it_is']:+.1%} as it is")  # fmt: skip
    for stage, speeds in results["speed"].items():
        rates = speeds["tokens_per_second"]
        share = speeds["useful_tflops"] / results["bf16_tflops"]
        console.print(
            f"{stage}: toolkit {rates['toolkit']:,.0f}, stock {rates['stock']:,.0f} tokens/s "
            f"({speeds['toolkit_over_stock']:.2f}x, {share:.0%} of the {results['bf16_tflops']:.2f} bf16 TFLOP/s here)"
        )
    recovered = results["recovery"]
    console.print(f"recovery: {len(recovered['events'])} events, {recovered['steps']} steps finished")
    console.print(f"allocator: {results['allocator']}")
    if not results["measured"]:
        console.print("[yellow]no GPU: memory and speed of one are not measured by this run[/]")


if __name__ == "__main__":
    main()
