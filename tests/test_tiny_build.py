"""The embedded recipe's rows and tokenizer are what its build script makes, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TINY = ROOT / "recipes" / "tiny"


@pytest.mark.long
def test_the_committed_rows_and_tokenizer_are_what_the_script_makes(tmp_path: Path) -> None:
    command = [sys.executable, str(TINY / "build.py"), "--rows-only", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert Path("sft.jsonl") in made and Path("base/tokenizer.json") in made
    for name in made:
        assert (TINY / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_what_is_embedded_stays_small() -> None:
    assert (TINY / "base" / "model.safetensors").stat().st_size <= 6_000_000
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 8_000_000
