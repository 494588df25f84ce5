"""What is said of a model before and while it is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.engine.base import model
from toolkit.errors import UserError
from toolkit.recipe.load import load

BASE = ROOT / "recipes" / "tiny" / "base"


@pytest.mark.parametrize("name", ["base", "a/b/c", "hf_checkpoints/base"])
def test_a_base_at_any_path_of_this_machine_is_loaded(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(BASE, folder)
    assert model.load(load("tiny", (f"model.path={folder}",)), 64).notes == []


def test_more_tokens_than_the_model_has_positions_are_warned_of() -> None:
    positions = json.loads((BASE / "config.json").read_text())["max_position_embeddings"]
    [note] = model.load(load("tiny"), positions + 1).notes
    assert f"more than the {positions:,} positions" in note


def test_widths_that_the_kernel_of_a_cpu_cannot_pack_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(model.torch.cuda, "is_available", lambda: False)
    odd = load("tiny", ("model.architecture.intermediate_size=400",))
    with pytest.raises(UserError, match="gate_proj 400, up_proj 400: take --set"):
        model._check_widths(odd)
