"""Run directories: what counts as finished, what is moved aside, what is never half-written."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.errors import UserError
from toolkit.files import digest, write_json
from toolkit.records.marks import AdapterMark, Made
from toolkit.run.rundir import STARTED_FROM, WEIGHTS, RunDir
from toolkit.run.sealing import MARK, SEAL, check, seal


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "tiny", "sft")


def finish(run: RunDir, held: dict[str, object] | None = None, **trajectory: object) -> None:
    run.start(trajectory)
    run.adapter.mkdir()
    (run.adapter / WEIGHTS).write_text("weights")
    seal(run.adapter, MARK, AdapterMark(trajectory=trajectory, conditions=held, num_steps=1))
    run.record({"outcome": "finished"})


def test_an_adapter_without_its_mark_is_none(run: RunDir) -> None:
    run.start({})
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    assert run.finished_with() is None and not run.is_finished({})


@pytest.mark.parametrize("mark", [b"", b'{"num_steps": 3, "files": {"adapter_mo', b"\xff\xfe", b"[1]"])
def test_an_adapter_whose_mark_was_cut_off_is_none_and_is_not_loaded(run: RunDir, mark: bytes) -> None:
    finish(run, seed=1)
    (run.adapter / MARK).write_bytes(mark)
    assert not run.is_finished({"seed": 1})
    with pytest.raises(UserError, match=r"is damaged: .* cannot be read"):
        check(run.adapter)


def test_a_finished_run_of_other_values_is_refused_with_both_values(run: RunDir) -> None:
    finish(run, seed=1, beta=0.1)
    assert run.is_finished({"seed": 1, "beta": 0.1})
    with pytest.raises(UserError, match=r"seed: 1 then, 2 now.*") as error:
        run.is_finished({"seed": 2, "beta": 0.1})
    assert "beta" not in str(error.value) and "--fresh" in str(error.value)


def test_an_unfinished_run_goes_on_and_fresh_moves_it_aside_and_deletes_nothing(run: RunDir) -> None:
    run.start({"seed": 1})
    (run.path / "metrics.jsonl").write_text("0")
    assert run.start({"seed": 2}) is None, "nothing is trained yet, so it may still change"
    assert run.start({"seed": 1}) is None and (run.path / "metrics.jsonl").read_text() == "0"
    (run.checkpoints / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match="an unfinished sft run that was made otherwise"):
        run.start({"seed": 2})
    kept = []
    for number in range(3):
        kept += [run.start({"seed": number}, fresh=True)]
        assert not (run.path / "metrics.jsonl").exists()
        (run.path / "metrics.jsonl").write_text(str(number + 1))
    assert [(path / "metrics.jsonl").read_text() for path in kept if path] == ["0", "1", "2"]


def test_one_that_died_after_its_adapter_and_before_its_report_is_not_finished(run: RunDir) -> None:
    finish(run, seed=1)
    run.record({"outcome": "running"})
    assert run.finished_with() is not None and not run.is_finished({"seed": 1})


def test_an_unfinished_run_holds_to_what_it_was_made_with_and_a_finished_one_to_its_recipe(
    run: RunDir,
) -> None:
    run.start({"seed": 1})
    run.hold_to({"packages.torch": "1", "packages.trl": "1", "memory.recompute_layers": 3})
    run.hold_to({"packages.torch": "2"})
    assert run.settings() == {}, "nothing is trained yet"
    (run.checkpoints / "checkpoint-5").mkdir(parents=True)
    assert run.settings() == {"recompute_layers": 3}
    with pytest.raises(UserError, match=r"Changed: packages.torch: '2' then, '3' now$"):
        run.hold_to({"packages.torch": "3", "packages.trl": "1"})
    finish(run, seed=1)
    assert run.is_finished({"seed": 1}) and run.settings() == {}


def checkpoint(run: RunDir, step: int, **trajectory: object) -> None:
    """One as a run of these values leaves it."""
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_text(str(step))
    seal(
        folder,
        SEAL,
        Made(trajectory=trajectory, conditions={"packages.trl": "1", "memory.recompute_layers": 3}),
    )


@pytest.mark.parametrize("text", ["", '{"trajectory": {"lr": 1', "[]"])
def test_a_manifest_that_cannot_be_read_stops_with_what_to_do(run: RunDir, text: str) -> None:
    run.start({"lr": 1})
    checkpoint(run, 5, lr=1)
    run.manifest.write_text(text)
    for ask in (run.is_finished, run.start):
        with pytest.raises(
            UserError, match=r"cannot be read.*Put it back from a copy; or delete it.*--fresh"
        ):
            ask({"lr": 1})
    run.start({"lr": 2}, fresh=True)


def test_without_a_manifest_checkpoints_hold_the_run_to_their_own_recipe_and_conditions(run: RunDir) -> None:
    run.start({"lr": 1})
    checkpoint(run, 5, lr=1)
    for manifest in (None, json.dumps({"seed": 1}), json.dumps({"trajectory": {"lr": 2}})):
        run.manifest.unlink(missing_ok=True)
        if manifest:
            run.manifest.write_text(manifest)
        with pytest.raises(UserError, match=r"made otherwise.*Changed: lr: 1 then, 2 now"):
            run.start({"lr": 2})
    run.manifest.unlink()
    run.start({"lr": 1})
    assert run.settings() == {"recompute_layers": 3}
    with pytest.raises(UserError, match=r"packages.trl: '1' then, '2' now"):
        run.hold_to({"packages.trl": "2"})


def test_checkpoints_of_two_recipes_are_never_mixed(run: RunDir) -> None:
    run.start({"alpha": 32})
    checkpoint(run, 5, alpha=32)
    checkpoint(run, 6, alpha=64)
    for alpha in (32, 64):
        with pytest.raises(UserError, match="made otherwise"):
            run.start({"alpha": alpha})


def test_weights_of_which_nothing_says_how_they_were_made_are_refused(run: RunDir) -> None:
    run.start({"lr": 1})
    folder = run.checkpoints / "checkpoint-5"
    folder.mkdir(parents=True)
    seal(folder, SEAL)
    run.manifest.unlink()
    with pytest.raises(UserError, match=r"nothing in .* says by which recipe"):
        run.start({"lr": 1})


def test_a_manifest_that_is_deleted_in_mid_run_is_one_message(run: RunDir) -> None:
    run.start({"lr": 1})
    run.manifest.unlink()
    with pytest.raises(UserError, match="was deleted or damaged while the run went on"):
        run.record({"num_steps": 3})
    assert not run.manifest.exists(), "half a manifest would be worse than none"


def test_a_finished_adapter_that_is_not_what_was_saved_is_not_used(run: RunDir) -> None:
    finish(run, seed=1)
    (run.adapter / WEIGHTS).write_text("weightz")
    for ask in (lambda: run.is_finished({"seed": 1}), run.check_adapter):
        with pytest.raises(UserError, match=f"is damaged: {WEIGHTS} is not what was written"):
            ask()


def test_an_adapter_is_not_finished_once_the_one_that_it_continued_was_trained_again(run: RunDir) -> None:
    finish(run)
    dpo = run.of("dpo")
    finish(dpo, {f"sft{STARTED_FROM}": digest(run.adapter / WEIGHTS)})
    assert dpo.is_finished({})
    (run.adapter / WEIGHTS).write_text("other weights")
    with pytest.raises(UserError, match=r"continues another sft adapter.*run_dpo.py --recipe tiny --fresh"):
        dpo.is_finished({})
    run.start({}, fresh=True)
    assert dpo.is_finished({}), "nothing stands there to hold it against"


def test_what_a_killed_process_was_writing_is_swept(run: RunDir) -> None:
    run.start({})
    (run.path / ".manifest.json.123.tmp").touch()
    (run.path / ".adapter.tmp").mkdir()
    run.start({})
    assert [path.name for path in run.path.iterdir()] == ["manifest.json"]


def test_what_finds_no_room_leaves_nothing_and_the_old_file_whole(run: RunDir) -> None:
    write_json(run.report, {"old": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the kernel's own refusal, as of a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_json(run.report, {"new": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads(run.report.read_text()) == {"old": 1}
    assert [path.name for path in run.path.iterdir()] == ["report.json"]


def test_a_second_process_is_refused_with_the_name_of_the_first(run: RunDir) -> None:
    code = "from toolkit.run.rundir import RunDir; from pathlib import Path\n"
    code += f"with RunDir(Path({str(run.root)!r}), 'tiny', 'sft').locked(): pass"
    command = [sys.executable, "-c", code]
    with run.locked():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
        assert f"in use by process {os.getpid()} on" in run.problems()[0], "before anything heavy is loaded"
    assert run.problems() == []
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file stands in the way")
    with pytest.raises(UserError, match="choose --runs DIR"):
        RunDir(tmp_path, "tiny", "sft").start({})


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(UserError, match="Read-only file system; choose --runs DIR"):
            RunDir(tmp_path, "tiny", "sft").locked().__enter__()
        [problem] = RunDir(tmp_path, "tiny", "sft").problems()
        assert problem == f"cannot write to {tmp_path}/tiny/sft: Read-only file system; choose --runs DIR"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_json_is_whole_or_absent_and_knows_no_nan(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"loss": float("nan"), "all": [float("inf"), 1.5]})
    assert json.loads(file.read_text()) == {"loss": None, "all": [None, 1.5]}
    with pytest.raises(TypeError):
        write_json(file, {"loss": object()})
    assert json.loads(file.read_text())["all"] == [None, 1.5]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    run.path.parent.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (run.path.parent / ".sft.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write to"), run.locked():
        pass
    assert (tmp_path / "precious").read_text() == "precious"
