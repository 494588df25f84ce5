"""Merged weights -> 4 or 8 bits in the format of compressed-tensors, which vLLM and transformers load.

llm-compressor does it, in a process without Unsloth (quantiser.py), on rows that the stage was trained on: through the
recipe's own template, because what a model sees in use decides which errors matter.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from safetensors import safe_open

from toolkit import hardware
from toolkit.console.screen import bar
from toolkit.engine.data import preparation
from toolkit.engine.data.examples import load_tokenizer
from toolkit.engine.export import merge, quantiser
from toolkit.errors import INSTALL_QUANTISE, UserError
from toolkit.export.artefact import PROMPTING, Wanted
from toolkit.export.tool import tool
from toolkit.recipe import stages
from toolkit.records.parity import Tolerance

PACKAGES = ("llmcompressor", "compressed_tensors")
GROUP_SIZES = (
    128,
    64,
    32,
)  # weights that share a scale: the fewer, the nearer and the larger; servers know these
CALIBRATION_ROWS = 128  # measured: enough on the tiny recipe; of an 8B model 128 x 2,048 tokens
# Against the 16-bit base with the adapter beside it, in nats. Measured on the tiny recipe after SFT, on a CPU, beside
# each (maximum, mean); larger models were not measured.
TOLERANCES = {
    "gptq": Tolerance(4.0, 0.4, 0.8, "4 bits a weight; measured 0.65 and 0.075"),
    "awq": Tolerance(4.0, 0.4, 0.8, "4 bits a weight; not measured"),
    "fp8": Tolerance(1.5, 0.2, 0.9, "8 bits a weight and an activation; measured 0.25 and 0.047"),
    "w8a8": Tolerance(1.5, 0.2, 0.9, "8 bits a weight and an activation; measured 0.41 and 0.034"),
}


def check(wanted: Wanted) -> None:
    """Raises UserError naming everything that keeps this machine from making the export."""
    problems = []
    if wanted.format == "awq" and hardware.here().gpu is None:
        problems.append(
            "--format awq needs a GPU: llm-compressor's search for its scales fails on a CPU; take gptq, which has as "
            "many bits and runs here"
        )
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        problems.append(f"--format {wanted.format} needs {' and '.join(missing)}: {INSTALL_QUANTISE}")
    if problems:
        raise UserError(*problems)


def make(wanted: Wanted, merged: Path, target: Path, console: Console) -> None:
    """The quantised model in `target`, with what is needed to prompt and to stop. Raises UserError with
    llm-compressor's own last words."""
    widths = input_widths(merged)
    request = {
        "merged": str(merged),
        "target": str(target),
        "scheme": wanted.format,
        "group_size": group_size(widths) if wanted.format in ("gptq", "awq") else None,
        "rows": [] if wanted.format == "fp8" else calibration(wanted),
        "trust_remote_code": wanted.recipe.model.trust_remote_code,
    }
    with bar(console, f"quantising to {wanted.format}", None):
        done = tool([sys.executable, "-P", quantiser.__file__], json.dumps(request))
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise UserError(f"llm-compressor failed: {said}")
    for name in PROMPTING:  # as it was trained, not as a library writes it again
        if (merged / name).is_file():
            shutil.copy(merged / name, target)
    for file in target.glob("*.safetensors"):
        file.chmod(0o644)


def group_size(widths: set[int]) -> int:
    """The largest that divides the inputs of every layer. Raises UserError where none does."""
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if not fitting:
        raise UserError(
            f"the layers have {', '.join(map(str, sorted(widths)))} inputs, and no group of "
            f"{', '.join(map(str, GROUP_SIZES))} divides them all: take --format fp8 or w8a8, which have a scale a row"
        )
    return fitting[0]


def input_widths(merged: Path) -> set[int]:
    """Inputs of the linear layers that are quantised."""
    found = set()
    for file, names in merge.shards(merged).items():
        with safe_open(merged / file, framework="pt") as stream:
            for name in names:
                shape = stream.get_slice(name).get_shape()
                if len(shape) == 2 and name.endswith("_proj.weight"):
                    found.add(shape[1])
    return found


def calibration(wanted: Wanted) -> list[list[int]]:
    """Token ids of rows that the stage was trained on, whole: prompt and the reply that it is to give."""
    recipe, stage = wanted.recipe, stages.of(wanted.name)
    section, loaded = recipe.section(stage.name), load_tokenizer(recipe)
    rows = preparation.prepare(recipe, section, stage.row_kind, loaded, Console(quiet=True)).train
    if stage.row_kind == "labelled":
        labels = rows[preparation.LABEL][:]
        good = [place for place, label in enumerate(labels) if label]
        rows = rows.select(good or range(len(rows)))
    first = rows.select(range(min(len(rows), CALIBRATION_ROWS)))
    return [
        row["input_ids"]
        if "input_ids" in row
        else row["prompt_ids"] + row[preparation.IDS[stage.row_kind][1]]
        for row in first
    ]
