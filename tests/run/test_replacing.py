"""A comparison or an evaluation takes the place of the earlier one, and only when it is complete."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.errors import Interrupted, UserError
from toolkit.run.replacing import replacing
from toolkit.run.rundir import RunDir
from toolkit.run.runlog import LOG

QUIET = Console(quiet=True)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """One that stands there complete."""
    run = RunDir(tmp_path, "tiny", "eval")
    run.path.mkdir(parents=True)
    run.report.write_text("earlier")
    yield run
    LOG.close_file()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_the_earlier_one_is_moved_aside_once_the_new_one_is_complete(run: RunDir) -> None:
    console = Console(record=True, width=200)
    with replacing(run, console) as folder:
        (folder / "report.json").write_text("new")
        assert run.report.read_text() == "earlier"
    assert run.report.read_text() == "new" and run.log.is_file()
    (aside,) = names(run.path.parent) - {"eval"}
    assert (run.path.parent / aside / "report.json").read_text() == "earlier"
    assert aside in console.export_text()


@pytest.mark.parametrize(
    "error", [UserError("no such task"), Interrupted(15, "stopped"), KeyboardInterrupt(), ZeroDivisionError()]
)
def test_one_that_fails_leaves_the_earlier_one_and_a_log_only_of_an_internal_error(
    run: RunDir, error: BaseException
) -> None:
    with pytest.raises(type(error)), replacing(run, QUIET) as folder:
        (folder / "report.json").write_text("new")
        raise error
    assert run.report.read_text() == "earlier"
    left = {"eval.unfinished"} if isinstance(error, ZeroDivisionError) else set()
    assert names(run.path.parent) == {"eval", *left}
    with replacing(run, QUIET) as folder:
        assert not (folder / "report.json").exists(), "nothing of the one that failed"


def test_a_full_disk_is_one_message_and_leaves_the_earlier_one(run: RunDir) -> None:
    with pytest.raises(UserError, match="No space left on device"), replacing(run, QUIET):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert run.report.read_text() == "earlier" and names(run.path.parent) == {"eval"}


def test_two_at_a_time_are_refused(run: RunDir) -> None:
    with (
        replacing(run, QUIET),
        pytest.raises(UserError, match="in use by process"),
        replacing(run, QUIET),
    ):
        pass
    assert run.log.is_file()
