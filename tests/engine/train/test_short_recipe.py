"""A recipe that writes only its model, template and sets trains: every default is one that works."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.conftest import run_stage
from toolkit.recipe.load import load

QUICK = (
    "sft.max_steps=2",
    "dpo.max_steps=2",
    "sft.max_rows=32",
    "dpo.max_rows=32",
    "compare.max_new_tokens=4",
)


def test_both_stages_train_by_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "short.yaml"
    file.write_text((ROOT / "docs/recipe.md").read_text().partition("```yaml\n")[2].partition("```")[0])
    for stage in ("sft", "dpo"):
        done = run_stage(load(str(file), QUICK), stage, tmp_path / "runs")
        assert done.report["num_steps"] == 2
        resolved = (done.run.path / "recipe.resolved.yaml").read_text()
        assert "  lora_alpha: 16 # default" in resolved and "  max_steps: 2\n" in resolved
