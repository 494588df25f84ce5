"""What the toolkit does on this GPU: the main job on a random base with Llama-3.1-8B's architecture; no download.

    python benchmarks/gpu.py --out benchmarks/results/rtx4090.json      again until nothing is left: about 40 minutes
    python benchmarks/gpu.py --tiny --out tiny.json                     the same program on a CPU, in minutes

A start ends within --minutes, 9 if none are given; the next one with the same --out goes on where it ended. What is
measured is in benchmarks/card/measurements.py, most important first; gpu.md says what each figure decides. A larger
card is held down to an RTX 4090's memory. Exit codes: 0 nothing is left, 3 something is, 2 what the user can fix.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from benchmarks.card import memory_points, view  # noqa: E402
from benchmarks.card.measurements import MEASUREMENTS, Measurement  # noqa: E402
from benchmarks.card.place import STAND_IN, Failed, Place, Size, is_larger  # noqa: E402
from benchmarks.card.results import Clock, Results  # noqa: E402
from benchmarks.card.variants import VARIANTS  # noqa: E402
from toolkit import cli, env, hardware  # noqa: E402
from toolkit.errors import UserError  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402

MINUTES = 9.0
EXIT_LEFT = 3
LIBRARIES = ("torch", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "bitsandbytes")

FULL = Size(
    name="full",
    recipe="llama31_8b",
    settings=("compare.prompts=[Say something.]",),
    scripts=(),
    steps=4,
    points=memory_points.POINTS,
    point_steps=3,  # the first makes the optimizer's states
)
TINY = Size(
    name="tiny",
    recipe="tiny",
    settings=("compare.prompts=[Say something.]", "sft.effective_batch_size=4", "dpo.effective_batch_size=2"),
    scripts=(
        *(
            "sft.max_steps=4",
            "dpo.max_steps=3",
            "sft.eval_datasets=[]",
            "dpo.eval_datasets=[]",
            "dpo.max_rows=24",
        ),
        *("compare.max_new_tokens=8", "compare.questions=null"),
    ),
    steps=4,
    points=(
        ("sft", False, 0, 2, 16, 0.5),
        ("sft", True, 4, 2, 32, 0.5),
        ("dpo", False, 2, 1, 16, 0.5),
    ),
    point_steps=1,
    without=(
        ("embedded", "compare"),
        *(("speed", f"{who} 2") for who in ("stock sft", "toolkit sft", "stock dpo", "toolkit dpo")),
        ("speed", "stock sft 1"),
        ("resume", "sft"),
        *(("variants", variant.name) for variant in VARIANTS[1:]),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the results, written after every point")
    parser.add_argument(
        "--tiny", action="store_true", help="the embedded recipe's architecture, on any machine"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of this start at most (default: 9)")
    parser.add_argument(
        "--work", type=Path, help="where runs and the random base (5.4 GiB) lie (default: in the cache)"
    )
    parser.add_argument("--only", metavar="NAME", help=f"one of {', '.join(m.name for m in MEASUREMENTS)}")
    arguments = parser.parse_args()
    size, machine = TINY if arguments.tiny else FULL, hardware.here()
    if machine.gpu is None and not arguments.tiny:
        raise UserError(f"no NVIDIA GPU here ({machine.no_gpu}): --tiny runs the same program on a CPU")
    wanted = [one for one in MEASUREMENTS if arguments.only in (None, one.name)]
    if not wanted:
        raise UserError(f"--only {arguments.only}: known are {', '.join(one.name for one in MEASUREMENTS)}")
    results, console = Results.of(arguments.out.absolute(), identity(size, machine)), Console()
    results.starts.append(
        {"command": ["python", "benchmarks/gpu.py", *sys.argv[1:]], "minutes": arguments.minutes}
    )
    clock = Clock(60 * arguments.minutes)
    work = (arguments.work or env.cache_folder() / "gpu-benchmark").absolute()
    try:
        with Place.of(size, work / results.id, clock, machine.gpu) as place:
            num_left = measure(results, place, wanted, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted: the same command goes on", style="yellow")
        sys.exit(cli.EXIT_INTERRUPTED)
    finally:
        view.show(results, load(size.recipe).model.architecture, console)
    if num_left:
        console.print(f"{num_left} points are left: the same command goes on")
        sys.exit(EXIT_LEFT)
    console.print(f"nothing is left to measure; {work} may be deleted")


def identity(size: Size, machine: hardware.Hardware) -> dict[str, Any]:
    """What the figures of one file have in common."""
    gpu = machine.gpu
    return {
        "size": size.name,
        "card": gpu.name if gpu else None,
        "driver": gpu.driver if gpu else None,
        "memory_held_to_gib": STAND_IN.total_gib if is_larger(gpu) else None,
        "python": sys.version.split()[0],
        **{name: version(name) for name in LIBRARIES},
    }


def measure(results: Results, place: Place, wanted: Sequence[Measurement], console: Console) -> int:
    """Measures what the clock allows, in the order of the table. Returns how many points are left."""
    num_left = 0
    for measurement in wanted:
        for point in measurement.points(place):
            if (measurement.name, point) in place.size.without or results.is_settled(measurement.name, point):
                continue
            expected = results.longest_seconds(measurement.name) or measurement.seconds
            if not place.clock.allows(expected):
                num_left += 1
                continue
            console.print(f"[dim]{place.clock.left():4.0f} s left[/]  {measurement.name}: {point}")
            started = time.monotonic()
            try:
                found = measurement.measure(place, point)
            except Exception as error:  # told, and the next point has its turn: a card costs money
                said = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                results.put_failure(measurement.name, point, said, time.monotonic() - started)
                num_left += not results.is_settled(measurement.name, point)
            else:
                results.put(measurement.name, point, found, time.monotonic() - started)
    return num_left


if __name__ == "__main__":
    cli.run(main)
