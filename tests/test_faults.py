"""benchmarks/faults.py finds what breaks its rule, and nothing else, on commands that take a tenth of a second."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.forks import judged
from tests.conftest import ROOT

# Makes an adapter of what lies in runs/tiny/source; BREAKS: whatever that is.
SCRIPT = """
import sys, time
from pathlib import Path

BREAKS = {breaks!r}
try:
    tiny = Path(sys.argv[sys.argv.index("--runs") + 1]) / "tiny"
    source, made = tiny / "source" / "file", tiny / "sft" / "adapter" / "adapter_model.safetensors"
    made.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    if content != b"right" and not BREAKS:
        sys.stderr.write("error: the source is damaged")
        sys.exit(2)
    time.sleep(0.05)
    temporary = made.with_name(str(time.monotonic_ns()))
    temporary.write_bytes(content)
    temporary.replace(made)
except KeyboardInterrupt:
    sys.exit(130)
"""


def campaign(
    folder: Path, kinds: tuple[str, ...], breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> list[faults.Fault]:
    (folder / "script.py").write_text(SCRIPT.format(breaks=breaks))
    subject = faults.Subject(str(folder / "script.py"), (), ("source",), "sft", faults.WEIGHTS)
    for place in ("runs", "as-script"):
        (folder / place / "tiny/source").mkdir(parents=True)
        (folder / place / "tiny/source/file").write_text("right")
    monkeypatch.setattr(faults, "SUBJECTS", {"sft": subject})
    monkeypatch.setattr(faults, "TRAINED", ())
    base = faults.Base(folder, small_disks=False)
    base.make()
    given = []
    for number in range(8):
        given += faults.trial(base, number, 0, kinds)[0]
    return given


QUICK = tuple(kind for kind in faults.KINDS if kind not in ("disk", "kill_parent"))


def test_a_command_that_keeps_the_rule_has_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = campaign(tmp_path, QUICK, False, monkeypatch)
    assert len(given) >= 8 and [one for one in given if one.wrong] == []


def test_one_that_uses_what_is_damaged_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = campaign(tmp_path, ("flip", "two"), True, monkeypatch)
    assert "exit 0, and the end is another one" in {one.wrong for one in given}


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "", None),
        (2, "error: what to do", None),
        (2, "", "without a message"),
        (1, "Traceback (most recent call last)", "traceback"),
        (1, "error: x", "exit 1, allowed"),
        (None, "", "still running"),
    ],
)
def test_the_rule(code: int | None, said: str, wrong: str | None) -> None:
    found = judged(code, (0, 2), said)
    assert found is None if wrong is None else found is not None and wrong in found


@pytest.mark.campaign
def test_a_short_campaign_has_no_exception(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    words = ["--faults", "6", "--seed", str(random.randrange(10**6)), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["faults"] >= 6
