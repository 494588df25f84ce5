"""A command of the README is code: each is parsed by the script it names, and planned where that can be."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted({line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line})
PLANNED = ("run_sft.py", "run_dpo.py")  # of the other scripts the options are looked up
SCRIPTS = [command for command in COMMANDS if command.startswith("python run_")]


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_is_called_as_it_can_be(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    if "--preview" not in words:
        words += ["--help"] if words[0] not in PLANNED else [] if "--plan" in words else ["--plan"]
    words += ["--runs", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if words[0] not in PLANNED:
        options = {word for word in words if word.startswith("--")}
        assert all(option in done.stdout for option in options)


def test_make_targets_and_requirement_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
        for name in re.findall(r"-r (\S+)", command):
            assert (ROOT / name).is_file()


def test_the_tree_names_every_package() -> None:
    tree = README.partition("## The house")[2].partition("## When")[0]
    for path in (ROOT / "toolkit").iterdir():
        named = f"{path.name}/" if path.is_dir() else path.name
        assert named in tree or path.name.startswith("__"), named
