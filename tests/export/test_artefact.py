"""An export is there only as it was made: whole, of this adapter, and nothing else's."""

import argparse
import errno
import os
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
    with asked.building():
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


def test_a_full_disk_is_one_message_and_leaves_nothing(runs: Path) -> None:
    asked = wanted(runs)
    with pytest.raises(UserError, match="No space left on device"), asked.building():
        (asked.temporary / WEIGHTS).write_text("expo")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in asked.folder.parent.iterdir()] == [f".{asked.folder.name}.lock"]


def test_two_at_once_are_one_and_a_message(runs: Path) -> None:
    asked = wanted(runs)
    with asked.building(), pytest.raises(UserError, match=r"in use by process .* choose --out DIR"):
        asked.building().__enter__()
    make(asked)
    assert asked.is_made()


def test_what_a_killed_export_was_building_is_swept(runs: Path) -> None:
    asked = wanted(runs)
    left = asked.folder.with_name(f".{asked.folder.name}.1.tmp")
    left.mkdir(parents=True)
    make(asked)
    assert not left.exists() and asked.is_made()


def test_another_stages_export_and_files_that_are_not_ours_are_never_replaced(
    runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(wanted(runs, "sft", out=out))
    assert make(wanted(runs, "sft", out=out)).is_made(), "its own earlier one is"
    for stage, kind in (("dpo", "adapter"), ("sft", "merged_16bit")):
        with pytest.raises(UserError, match="holds another export: tiny sft adapter: name another --out"):
            wanted(runs, stage, kind, out)
    asked = wanted(runs, "sft", out=out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"none of the export's: notes.txt"):
        wanted(runs, "sft", out=out)
    with pytest.raises(UserError, match=r"notes.txt"):
        make(asked)
    (out / MARK).unlink()
    with pytest.raises(UserError, match="is no export"):
        wanted(runs, "sft", out=out)
