"""What would be fetched, and what stands in its way, from a server on this machine; then it is, and runs without."""

import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.conftest import ROOT
from tests.doctor.hub_server import Hub, serving
from toolkit import hardware
from toolkit.doctor import sizes
from toolkit.errors import UserError
from toolkit.hardware import GIB
from toolkit.recipe.load import load

TINY = ROOT / "recipes/tiny"
OF_THE_HUB = (
    "model.path=owner/base-bnb-4bit",
    "model.base_16bit=owner/base",
    "sft.datasets.0.path=owner/rows",
    "sft.eval_datasets=[]",
    "dpo=null",
    "reward=null",
)
RECIPE = load("tiny", OF_THE_HUB)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    base = {file.name: file.read_bytes() for file in (TINY / "base").iterdir()}
    rows = {"sft.jsonl": (TINY / "sft.jsonl").read_bytes(), "README.md": b"---\nlicense: mit\n---\n"}
    with serving(
        {"models/owner/base": base, "models/owner/base-bnb-4bit": base, "datasets/owner/rows": rows}
    ) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def test_every_part_is_told_with_its_size_and_licence(hub: Hub) -> None:
    model, rows = sizes.parts(RECIPE, with_base=False)
    assert model.needed_gib == sum(file.stat().st_size for file in (TINY / "base").iterdir()) / GIB
    assert rows.needed_gib > 2 * (TINY / "sft.jsonl").stat().st_size / GIB
    assert "licence apache-2.0" in model.told() and "owner/base-bnb-4bit" in model.told()
    paths = [part.repository.path for part in sizes.parts(RECIPE, with_base=True)]
    assert paths == ["owner/base-bnb-4bit", "owner/base", "owner/rows"]
    assert sizes.parts(load("tiny"), with_base=True) == []


def test_all_that_stands_in_the_way_is_said_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("models/owner/base-bnb-4bit")
    del hub.repositories["datasets/owner/rows"]
    with pytest.raises(UserError) as said:
        sizes.parts(RECIPE, with_base=False)
    assert "model owner/base-bnb-4bit: it is gated: accept its licence" in said.value.problems[0]
    assert "data set owner/rows: the Hub does not know it" in said.value.problems[1]
    hub.gated.clear()
    free = namedtuple("Usage", "total used free")(0, 0, 10 * 2**20)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"GiB are to be fetched and .* has 0.0 GiB free"):
        sizes.parts(load("tiny", (*OF_THE_HUB, f"sft.datasets.0.path={TINY}/sft.jsonl")), with_base=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        sizes.parts(RECIPE, with_base=False)


@pytest.mark.campaign
def test_what_was_fetched_is_read_without_the_hub_and_a_broken_transfer_goes_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.cut.add("model.safetensors")
    words = [word for override in OF_THE_HUB for word in ("--set", override)]

    def run(name: str, *more: str, **environment: str) -> str:
        command = [sys.executable, str(ROOT / f"run_{name}.py"), "--recipe", "tiny", *words, *more]
        variables = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url} | environment
        variables.pop("HF_HUB_CACHE", None)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "it runs without network: HF_HUB_OFFLINE=1" in run("fetch", HF_HUB_OFFLINE="0")
    assert not hub.cut, "a transfer that broke off"
    hub.repositories.clear()
    assert "rows used" in run("sft", "--preview", "1", HF_HUB_OFFLINE="1")
