"""The Colab notebook: its cells run, one after the other, on a CPU with the tiny recipe."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS
from tests.engine.scripts import Script
from toolkit.hardware import BF16_SM, Gpu, old_card
from toolkit.recipe.load import names

NOTEBOOK = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SETUP = [
    "setup" in cell["metadata"].get("tags", ()) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"
]


def python_of(cell: str) -> str:
    """The cell with its `!` lines as calls of `shell`, as IPython reads them."""
    return re.sub(r"^(\s*)!(.*)$", lambda found: f"{found[1]}shell(f{found[2]!r})", cell, flags=re.MULTILINE)


def test_the_cells_are_python_and_name_what_there_is() -> None:
    assert [True, *[False] * (len(CELLS) - 1)] == SETUP and "make setup" in CELLS[0]
    for cell in CELLS[1:]:
        ast.parse(python_of(cell))
        assert all((ROOT / script).is_file() for script in re.findall(r"run_\w+\.py", cell))
    assert set(re.findall(r"\b(?:tiny|llama\w+)\b", "".join(CELLS))) <= set(names())
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])


def test_a_t4_is_refused_with_the_reason_that_the_notebook_gives() -> None:
    said = old_card(Gpu("Tesla T4", 15.0, 15.0, (7, 5), "580.65", (13, 0)))
    assert said and "compute capability 7.5, bf16 needs 8.0 or more" in said
    told = "".join(NOTEBOOK["cells"][0]["source"])
    assert "compute capability 7.5" in told and f"begins with {BF16_SM[0]}.{BF16_SM[1]}" in told


@pytest.mark.campaign
def test_the_cells_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def shell(command: str) -> None:
        python, *words = shlex.split(command)
        assert python == ".venv/bin/python"
        script = Script(words, tmp_path / f"{words[0]}.said")
        assert script.wait() == 0, script.said()

    class Display:
        HTML = staticmethod(str)
        display = staticmethod(shown.append)

    monkeypatch.setitem(sys.modules, "IPython", Display)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", Display)  # type: ignore[arg-type]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a cell sets it
    space: dict[str, Any] = {"shell": shell}
    for cell in CELLS[1:]:
        exec(python_of(cell), space)
        if "RUNS, ARGS" in cell:
            few = [*FEW_ROWS, "dpo.max_steps=2", "compare.questions=null"]
            space |= {"RUNS": str(tmp_path), "ARGS": " ".join(f"--set {override}" for override in few)}
    assert [page.startswith("<iframe srcdoc=") for page in shown] == [True, True]
    assert "tiny" in shown[0] and "Direct preference optimisation" in shown[1]
