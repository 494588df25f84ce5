"""A command in a message is one that can be pasted, and a Python that cannot run it says so."""

import ast
import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from toolkit import command

SCRIPTS = sorted(ROOT.glob("run_*.py"))


def test_it_repeats_the_interpreter_and_the_options_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "../run_dpo.py",
        "--recipe=my.yaml",
        "--runs",
        "/big disk/runs",
        "--set",
        "a=[b, c]",
        "--name",
        "x",
    ]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", *words])
    proposed = command.propose("sft", "tiny", "--fresh")
    assert shlex.split(proposed) == [
        *(".venv/bin/python", "../run_sft.py", "--recipe", "my.yaml", "--runs", "/big disk/runs"),
        *("--set", "a=[b, c]", "--fresh"),
    ]
    monkeypatch.setattr(sys, "argv", ["pytest", "--runs", "elsewhere"])
    assert command.propose("sft", "tiny") == "python run_sft.py --recipe tiny"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_python_without_packages_says_which_one_to_take(script: "os.PathLike[str]") -> None:
    done = subprocess.run(  # -S: no site-packages
        [sys.executable, "-S", str(script), "--set", "a=b c"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "without rich" in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f".venv/bin/python {script} --set 'a=b c'`\n")


def test_an_older_python_can_read_what_says_so() -> None:
    for file in (*SCRIPTS, ROOT / "toolkit" / "__init__.py"):
        ast.parse(file.read_text(), feature_version=(3, 9))
        first = next(line for line in file.read_text().splitlines() if line.startswith(("import", "from")))
        assert first.startswith(("from toolkit", "import os", "import sys")), file
