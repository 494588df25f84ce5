"""16-bit weights -> GGUF with the user's own llama.cpp: its converter, its quantisation.

Nothing is installed, cloned or compiled here, and Unsloth's `save_pretrained_gguf`, which does all three unattended, is
never called.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit.errors import UserError
from toolkit.export.artefact import QUANTS, Wanted
from toolkit.export.tool import tool
from toolkit.records.parity import Tolerance

CONVERTER = "convert_hf_to_gguf.py"
WHOLE = ("f16", "bf16")  # not quantised
LACKS = (
    "if that is a missing sentencepiece: `pip install sentencepiece`; all of llama.cpp's own requirements.txt would "
    "replace torch and transformers here"
)
# Against the 16-bit base with the adapter beside it, in nats. Estimates: none was measured with llama.cpp's converter.
_NEAR = Tolerance(0.3, 0.03, 0.95, "16-bit weights in llama.cpp's kernels; not measured")
_EIGHT = Tolerance(1.0, 0.12, 0.9, "8 bits a weight; not measured")
_SIX = Tolerance(3.0, 0.3, 0.85, "5 and 6 bits a weight; not measured")
_FOUR = Tolerance(4.0, 0.4, 0.8, "4 bits a weight; not measured")
_LESS = Tolerance(8.0, 1.2, 0.6, "2 and 3 bits a weight; not measured")
BITS = {"8": _EIGHT, "6": _SIX, "5": _SIX, "4": _FOUR, "3": _LESS, "2": _LESS}
TOLERANCES = {name: _NEAR if name in WHOLE else BITS[name[1]] for name in QUANTS}


def with_nf4(limit: Tolerance) -> Tolerance:
    """The same against the model as trained, on NF4: that error and the quantisation's together."""
    return Tolerance(
        limit.max_logprob_diff + 4,
        limit.mean_logprob_diff + 0.5,
        limit.equal_greedy_fraction - 0.1,
        f"the base's NF4 error, and {limit.why}",
    )


@dataclass(frozen=True)
class Tools:
    """What converts and quantises here. `quantise` None: the binding."""

    converter: Path
    quantise: Path | None


def tools(wanted: Wanted) -> Tools:
    """What this machine has for the export. Raises UserError naming everything that is missing and how to get it."""
    folder, problems = wanted.llama_cpp, []
    if folder is None:
        problems.append(
            "nothing here converts to GGUF: get llama.cpp (`git clone --depth 1 "
            "https://github.com/ggml-org/llama.cpp`) and name its folder with --llama-cpp or LLAMA_CPP_PATH"
        )
    elif not (folder / CONVERTER).is_file():
        problems.append(f"{folder} has no {CONVERTER}: name the folder of a llama.cpp checkout")
    binary = _binary(folder)
    binding = importlib.util.find_spec("llama_cpp") is not None
    if wanted.quant not in WHOLE and not (binary or binding):
        problems.append(
            f"nothing here quantises to {wanted.quant}: build llama.cpp's llama-quantize (`cmake -B build && "
            "cmake --build build --target llama-quantize`), or `pip install llama-cpp-python`, or take --quant f16"
        )
    if wanted.verify and not binding:
        problems.append(
            "nothing here loads a GGUF to check it: `pip install llama-cpp-python`, or take --no-verify"
        )
    if problems or folder is None:
        raise UserError(*problems)
    return Tools(folder / CONVERTER, binary)


def target(wanted: Wanted) -> Path:
    return wanted.temporary / f"{wanted.recipe.name}-{wanted.name}-{wanted.quant}.gguf"


def make(wanted: Wanted, merged: Path, tools: Tools, console: Console) -> Path:
    """The GGUF of a merged model, beside the folder that holds it. Raises UserError with the tools' own last words."""
    file, first = target(wanted), wanted.quant if wanted.quant in WHOLE else "bf16"
    whole = file.with_name(f"whole-{first}.gguf") if first != wanted.quant else file
    console.print(f"[dim]converting with {escape(str(tools.converter))}[/]")
    converter = [sys.executable, str(tools.converter), str(merged)]
    _run([*converter, "--outfile", str(whole), "--outtype", str(first)], LACKS)
    if wanted.quant not in WHOLE:
        console.print(f"[dim]quantising to {wanted.quant}[/]")
        if tools.quantise:
            _run([str(tools.quantise), str(whole), str(file), str(wanted.quant).upper()], "")
        else:
            _quantise(whole, file, QUANTS[str(wanted.quant)])
        whole.unlink()
    return file


def _binary(folder: Path | None) -> Path | None:
    """The user's llama-quantize: where llama.cpp's own build puts it, or on the PATH."""
    places = [folder / place / "llama-quantize" for place in ("", "build/bin", "bin")] if folder else []
    found = next((place for place in places if place.is_file()), None) or shutil.which("llama-quantize")
    return Path(found) if found else None


def _run(command: list[str], hint: str) -> None:
    done = tool(command)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise UserError(
            f"{Path(command[0]).name} {Path(command[1]).name} failed: {said}" + (f"\n{hint}" if hint else "")
        )


def _quantise(source: Path, target: Path, number: int) -> None:
    """With llama-cpp-python, in a process of its own: it prints its progress past Python."""
    code = (
        "import ctypes, sys, llama_cpp\n"
        "how = llama_cpp.llama_model_quantize_default_params(); how.ftype = int(sys.argv[3])\n"
        "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))\n"
    )
    _run([sys.executable, "-c", code, str(source), str(target), str(number)], "")
