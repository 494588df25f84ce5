"""What a run shows while it goes, and what it leaves to be read: the panel, log.txt, TensorBoard, W&B."""

import io
import json
import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import run_stage, tiny
from toolkit.console.screen import Screen
from toolkit.engine.base import hub, vram
from toolkit.engine.base.quiet import quiet
from toolkit.engine.train import progress
from toolkit.errors import UserError
from toolkit.run.runlog import LOG

KEY = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "aB3" * 11 + "x"
STEPS = ("sft.max_steps=6", "sft.save_steps=2", "sft.eval_datasets=[]", "sft.eval_rows=8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def entries(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.campaign
def test_trackers_get_the_curve_of_metrics_jsonl_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    nobody = socket.create_server(("127.0.0.1", 0))
    nobody.setblocking(False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    prompts = f"compare.prompts=['What does {TOKEN} open?']"
    recipe = tiny(*STEPS, "sft.report_to=[tensorboard, wandb]", f"description=made with {TOKEN}", prompts)
    run = run_stage(recipe, "sft", tmp_path).run
    shutil.rmtree(run.adapter)  # as if it had been killed between the checkpoint of step 4 and that of step 6
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    assert "continuing at step 4" in run_stage(recipe, "sft", tmp_path).shown

    losses = entries(run.path, "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    events = event_accumulator.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    speeds = {event.step: event.value for event in events.Scalars("train/tokens_per_second")}
    assert speeds == pytest.approx(entries(run.path, "tokens_per_second"))
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(entries(run.path, "eval_loss")[6])

    first, second = sorted(
        (run.path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda f: f.parent.name
    )
    assert first.name == second.name == f"run-{json.loads(run.manifest.read_text())['wandb_run']}.wandb"
    logged = {**wandb_curve(first), **wandb_curve(second)}
    assert logged == pytest.approx(losses) and list(wandb_curve(second)) == [5, 6]

    with pytest.raises(BlockingIOError):
        nobody.accept()
    nobody.close()
    files = [file for file in run.path.rglob("*") if file.is_file()]
    for secret in (KEY, TOKEN):
        assert not [file for file in files if secret.encode() in file.read_bytes()], "a secret was written"
    assert "What does *** open?" in (run.path / "answers.jsonl").read_text()
    assert any(b"made with ***" in file.read_bytes() for file in (first, second)), "the recipe that W&B has"


def wandb_curve(file: Path) -> dict[int, float]:
    """train/loss by step of an offline W&B run: protobuf records in LevelDB's log format, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, curve = file.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record, place = record + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = {
                item.key or "/".join(item.nested_key): item for item in Record.FromString(record).history.item
            }
            if "train/loss" in items:
                step = json.loads(items["train/global_step"].value_json)
                curve[step] = json.loads(items["train/loss"].value_json)
            record = b""
    return curve


def test_on_a_terminal_a_panel_and_afterwards_only_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DRAWN_PER_SECOND", 50)  # often enough to show every part of a short run
    terminal = Terminal()
    console = Screen(file=terminal, force_terminal=True, width=100, height=40)
    recipe = tiny(*STEPS, "sft.eval_steps=3")
    run = run_stage(recipe, "sft", tmp_path, console).run
    written = terminal.getvalue()
    for said in (
        "step 6 of 6",
        "elapsed",
        "grad norm",
        "RAM",
        "evaluating",
        "saving the adapter",
        "held-out",
    ):
        assert said in written, said
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0, "the cursor stays hidden"
    assert written.rstrip().endswith("\x1b[0m") and "Unsloth 20" not in written
    log = run.log.read_text()
    assert "\x1b" not in log and "[printed] Unsloth" in log
    for said in ("loading tiny/base", "6/6  loss", "checkpoint of step 4 saved", "3/6  held-out  loss"):
        assert said in log, said


@pytest.fixture
def terminal_that_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    class Failing(vram.Timeline):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                print("a library's last words")
                raise RuntimeError("the device is gone")

    monkeypatch.setattr(vram, "Timeline", Failing)
    yield Terminal()


def test_a_fault_leaves_the_terminal_clean_and_its_traceback_in_the_log(
    tmp_path: Path, terminal_that_fails: Terminal
) -> None:
    console = Screen(file=terminal_that_fails, force_terminal=True, width=60, height=20)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_stage(tiny(*STEPS), "sft", tmp_path, console)
    drawn, _, after = terminal_that_fails.getvalue().rpartition("\x1b[2K")
    assert not console._live_stack and "step 1 of 6" in drawn and after.strip().startswith("\x1b[2mreport:")
    log = (tmp_path / "tiny" / "sft" / "log.txt").read_text()
    assert "[printed] a library's last words" in log
    assert "Traceback" in log and "RuntimeError: the device is gone" in log


def test_how_much_of_a_model_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--owner--name" / "blobs"
    assert hub.fetching("tiny/base")() == hub.fetching("recipes/tiny/base")() == ""
    blobs.mkdir(parents=True)
    (blobs / "before").write_bytes(b"x")
    fetched = hub.fetching("owner/name")
    assert fetched() == ""
    with (blobs / "part.incomplete").open("wb") as stream:
        stream.truncate(3 * 2**29)
    assert fetched() == "(1.50 GiB fetched)"


def test_what_is_printed_before_there_is_a_log_is_shown_when_it_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    LOG.close_file()
    with quiet():
        print("all is well")
        sys.stderr.write("10%\r50%\r")
        sys.stderr.write("100%\rdone\n")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError), quiet():
        raise UserError("fix this")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(RuntimeError), quiet():
        print("no kernel for this card")
        raise RuntimeError
    said = capsys.readouterr().err
    assert "no kernel for this card" in said and "[printed] done" in said and "50%" not in said
