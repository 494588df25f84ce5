"""GGUF for real: exports of the embedded recipe, loaded by llama.cpp and held against the merged model.

    python benchmarks/gguf.py [--runs DIR] [--stage sft|dpo] [--wheel FILE]

Builds llama-cpp-python from its source package into a folder of its own (within 11 minutes, as one job on a busy
machine; it needs a C++ compiler, and nothing is put into the project's environment), or takes a wheel of it. Then runs
`run_export.py` for a 16-bit GGUF, two quantised ones and Ollama's, each checked by llama.cpp itself, and writes
results/gguf.json.
Needs a finished run of the recipe tiny, and the package gguf (requirements-optional.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINDING = "llama_cpp_python==0.3.36"
BESIDE = "diskcache==5.6.3"  # the one package it imports that the project's environment lacks
EXPORTS = (("gguf", "f16"), ("gguf", "q8_0"), ("gguf", "q4_k_m"), ("ollama", "q8_0"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where a finished run of tiny is")
    parser.add_argument("--stage", choices=("sft", "dpo"), default="dpo")
    parser.add_argument("--wheel", type=Path, help="of llama-cpp-python, instead of building it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        folder, started = Path(name), time.perf_counter()
        install(folder / "binding", arguments.wheel)
        print(f"llama-cpp-python there after {time.perf_counter() - started:.0f} s")
        results = [
            export(arguments, folder, kind, quant) | {"format": kind, "quant": quant}
            for kind, quant in EXPORTS
        ]
    target = ROOT / "benchmarks" / "results" / "gguf.json"
    target.write_text(
        json.dumps({"binding": BINDING, "stage": arguments.stage, "exports": results}, indent=2) + "\n"
    )
    for row in results:
        print(
            f"{row['format']:>7} {row['quant']:>7}  equal greedy {row['equal_greedy_fraction']:.1%}  "
            f"log-probs differ by {row['mean_logprob_diff']:.4f} (mean) {row['max_logprob_diff']:.4f} (most)  "
            f"{row['mib']:.1f} MiB"
        )


def install(target: Path, wheel: Path | None) -> None:
    """llama-cpp-python into `target`, with pip's own isolated build; one job, so that a shared machine stays usable."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    environment = os.environ | {
        "CMAKE_BUILD_PARALLEL_LEVEL": "1",
        "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF",
    }
    subprocess.run([*command, str(wheel or BINDING), BESIDE], check=True, env=environment)


def export(arguments: argparse.Namespace, folder: Path, kind: str, quant: str) -> dict[str, float]:
    """What parity.json says of one export that passed, and its size; the script stops at one that did not."""
    out = folder / f"{kind}-{quant}"
    command = [sys.executable, str(ROOT / "run_export.py"), "--recipe", "tiny", "--stage", arguments.stage]
    command += ["--format", kind, "--quant", quant, "--out", str(out), "--runs", str(arguments.runs)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(folder / "binding")})
    measured = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    keys = ("max_logprob_diff", "mean_logprob_diff", "equal_greedy_fraction", "num_positions", "quantisation")
    size = sum(file.stat().st_size for file in out.glob("*.gguf")) / 2**20
    return {key: measured[key] for key in keys} | {"mib": round(size, 2)}


if __name__ == "__main__":
    main()
