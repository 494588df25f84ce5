"""An export is there only as it was made: whole, of this adapter, and nothing else's."""

import argparse
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.export import artefact
from toolkit.recipe.load import load
from toolkit.records.marks import AdapterMark
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.run.sealing import MARK, seal

RECIPE = load("tiny")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Both stages finished, as far as files go."""
    for stage in ("sft", "dpo"):
        run = RunDir(tmp_path, "tiny", stage)
        run.start(RECIPE.trajectory(stage))
        run.adapter.mkdir()
        (run.adapter / WEIGHTS).write_text(stage)
        mark = AdapterMark(trajectory=RECIPE.trajectory(stage), conditions=None, num_steps=1)
        seal(run.adapter, MARK, mark)
        run.record({"outcome": "finished"})
    return tmp_path


def wanted(runs: Path, stage: str = "sft", kind: str = "adapter", out: Path | None = None) -> artefact.Wanted:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    artefact.add_options(parser)
    words = ["--runs", str(runs), "--stage", stage, "--format", kind, *(["--out", str(out)] if out else [])]
    return artefact.wanted(RECIPE, parser.parse_args(words))


def make(asked: artefact.Wanted) -> artefact.Wanted:
    asked.temporary.mkdir(parents=True)
    (asked.temporary / WEIGHTS).write_text("exported")
    asked.keep(verified=True)
    return asked


def test_an_export_that_was_changed_since_its_check_is_not_this_export(runs: Path) -> None:
    asked = make(wanted(runs))
    assert asked.is_made()
    (asked.folder / WEIGHTS).write_text("export")
    assert not asked.is_made()


def test_an_adapter_that_is_not_what_was_saved_is_not_exported(runs: Path) -> None:
    (RunDir(runs, "tiny", "sft").adapter / WEIGHTS).write_text("other")
    with pytest.raises(UserError, match="is damaged"):
        wanted(runs)
