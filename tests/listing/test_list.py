"""run_list.py: what it says of every run, and what it lets go and what it does not."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_cli import mistake, script
from toolkit.errors import UserError
from toolkit.files import digest, write_json
from toolkit.listing import entries, leftovers, removal, request, view
from toolkit.records.marks import AdapterMark, ExportMark
from toolkit.run import caches
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.run.sealing import MARK, seal

HOURS_AGO = [f"2026-11-20T{hour:02}:00:00+00:00" for hour in range(24)]


def make_run(root: Path, name: str, weights: str | None = "w", start: str = "", **facts: Any) -> RunDir:
    """A run as it lies on disk; it continues `start`, as that one stands now."""
    run = RunDir(root, "tiny", name)
    run.path.mkdir(parents=True)
    if weights:
        run.adapter.mkdir()
        (run.adapter / WEIGHTS).write_text(weights)
        seal(run.adapter, MARK, AdapterMark(trajectory={}, conditions={}, num_steps=2))
    held = {"packages.torch": "2.13.0"}
    if start:
        held[f"{start}_adapter"] = digest(run.of(start).adapter / WEIGHTS)
    known = {"outcome": "finished", "started": HOURS_AGO[1], "ended": HOURS_AGO[2]}
    write_json(run.manifest, {"conditions": held} | known | facts)
    lines = [
        {"step": 1, "loss": 0.7, "rewards/margins": 0.0},
        {"step": 2, "loss": 0.5, "rewards/margins": 1.25},
        {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.875, "eval_runtime": 3.0},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def listed(root: Path, *options: str) -> list[dict[str, Any]]:
    """What --json writes."""
    arguments = request.parse("", ["--runs", str(root), *options])
    return json.loads(view.as_json(request.chosen(entries.find(root), arguments)))  # type: ignore[no-any-return]


def names(found: list[dict[str, Any]]) -> list[str]:
    return [entry["name"].removeprefix("tiny/") for entry in found]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of one recipe, of every kind; the newest is the export, then DPO."""
    make_run(tmp_path, "sft", attempts=[{"started": HOURS_AGO[1], "ended": HOURS_AGO[2], "seconds": 9.0}])
    make_run(tmp_path, "dpo-beta02", "d", "sft", ended=HOURS_AGO[3])
    make_run(tmp_path, "dpo", None, "sft", outcome="running", ended=None)
    evaluated = {"models": {"base": {"loss": {"value": 4.25}}, "sft": {"loss": {"value": 0.5}}}}
    write_json(tmp_path / "tiny/eval/report.json", evaluated | {"wall_seconds": 7.0})
    export = tmp_path / "tiny/export/dpo-beta02-adapter"
    export.mkdir(parents=True)
    (export / WEIGHTS).write_text("d")
    made = dict.fromkeys(("recipe", "quant", "base", "revision", "base_16bit", "adapter_sha256"))
    seal(export, MARK, ExportMark(**made, stage="dpo-beta02", format="adapter", verified=True))
    return tmp_path


def test_a_line_says_what_a_run_was_and_what_it_continues(runs: Path) -> None:
    found = {entry["name"]: entry for entry in listed(runs)}
    beta02, dpo, sft = found["tiny/dpo-beta02"], found["tiny/dpo"], found["tiny/sft"]
    assert (beta02["outcome"], beta02["when"], beta02["num_steps"]) == ("finished", HOURS_AGO[3], 2)
    assert beta02["last"] == {"loss": 0.5, "rewards/margins": 1.25} and beta02["made_from"] == ["sft"]
    assert beta02["held_out"] == {"loss": 0.6, "rewards/accuracies": 0.875} and beta02["size_bytes"] > 0
    assert (sft["seconds"], sft["made_from"], dpo["outcome"]) == (9.0, ["base"], "killed")
    assert found["tiny/eval"]["held_out"] == {"loss": {"base": 4.25, "sft": 0.5}}
    assert found["tiny/export/dpo-beta02-adapter"]["made_from"] == ["dpo-beta02"]
    shown = script("list", "--runs", runs, light=True).stdout
    assert "margin 1.250" in shown and "accuracy 88%" in shown and "held-out loss 4.25, 0.5" in shown
    with RunDir(runs, "tiny", "dpo").locked():
        done = script("list", "--runs", runs, "--json", "--outcome", "running", light=True)
    assert names(json.loads(done.stdout)) == ["dpo"]


def test_the_list_is_sorted_and_filtered(runs: Path) -> None:
    write_json(runs / "other/sft/manifest.json", {"outcome": "failed", "ended": HOURS_AGO[9]})
    assert names(listed(runs, "--recipe", "tiny", "--stage", "dpo", "--sort", "name")) == [
        "dpo",
        "dpo-beta02",
    ]
    assert names(listed(runs, "--stage", "dpo-beta02")) == ["dpo-beta02"]
    assert names(listed(runs, "--outcome", "failed")) == ["other/sft"]
    assert names(listed(runs, "--stage", "sft")) == ["other/sft", "sft"]
    (runs / "tiny/sft/log.txt").write_bytes(b"x" * 10**6)
    assert names(listed(runs, "--sort", "size"))[0] == "sft"


def test_what_is_half_there_or_damaged_is_listed_too(tmp_path: Path) -> None:
    (tmp_path / "tiny/sft").mkdir(parents=True)
    (tmp_path / "tiny/dpo").mkdir()
    (tmp_path / "tiny/dpo/manifest.json").write_text('{"outcome": "fin')
    (tmp_path / "tiny/compare.unfinished").mkdir()
    outcomes = {entry["name"]: entry["outcome"] for entry in listed(tmp_path)}
    assert outcomes == {"tiny/sft": "not begun", "tiny/dpo": "damaged", "tiny/compare.unfinished": "failed"}


def test_without_a_folder_of_runs_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*/none; name where they are with --runs DIR"):
        entries.find(tmp_path / "none")


def test_only_the_end_of_what_grows_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft")
    run.metrics.write_text("".join(json.dumps({"step": n, "loss": n / 2}) + "\n" for n in range(5000)))
    [entry] = entries.find(tmp_path)
    assert (entry.num_steps, entry.last, entry.held_out) == (4999, {"loss": 2499.5}, {})
    assert run.metrics.stat().st_size > entries.END_BYTES


def test_a_run_goes_once_it_is_agreed_to_and_what_continues_it_is_said(runs: Path) -> None:
    said = mistake("list", "--runs", runs, "--remove", "tiny/sft", light=True)
    assert "no terminal to ask on" in said and "--yes" in said and (runs / "tiny/sft").exists()
    assert not answered(runs, "n", "--remove", "tiny/sft") and (runs / "tiny/sft").exists()
    done = script("list", "--runs", runs, "--remove", "tiny/sft", "tiny/dpo", "--yes", light=True)
    assert done.returncode == 0 and not (runs / "tiny/sft").exists() and not (runs / "tiny/dpo").exists()
    assert "tiny/dpo-beta02 continues tiny/sft" in done.stdout and "tiny/dpo continues" not in done.stdout
    assert answered(runs, "y", "--remove", "tiny/export/dpo-beta02-adapter")
    assert names(listed(runs, "--sort", "name")) == ["dpo-beta02", "eval"]


def answered(runs: Path, answer: str, *options: str) -> bool:
    """Whether the script, at a terminal, removed something after this answer."""
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    command = [sys.executable, "run_list.py", "--runs", str(runs), *options]
    done = subprocess.run(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0 and "[y/N]" in shown, shown
    return " 0, which made 0 B" not in shown


def test_what_a_process_holds_stays_and_all_mistakes_come_at_once(runs: Path) -> None:
    with RunDir(runs, "tiny", "dpo-beta02").locked(), pytest.raises(UserError) as refused:
        removal.named(entries.find(runs), ["tiny/dpo-beta02", "tiny/dpo-beta03"])
    held, unknown = refused.value.problems
    assert "tiny/dpo-beta02: a process holds it" in held and "did you mean tiny/dpo-beta02" in unknown
    going, _ = removal.named(entries.find(runs), ["tiny/dpo-beta02"])
    with RunDir(runs, "tiny", "dpo-beta02").locked(), pytest.raises(UserError, match="is in use by process"):
        removal.remove(going)  # it began while the question was on the screen
    assert (runs / "tiny/dpo-beta02/manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--remove", "tiny/sft", "--json"), "--json goes with the list"),
        (("--yes",), "--yes goes with --remove or --prune"),
        (("--prune", "--remove", "tiny/sft"), "not allowed with"),
        (("--stage", "sfd"), "one of sft, dpo"),
        (("--unused-days", "3"), "goes with --prune"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        request.parse("", options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.fixture
def pruned(runs: Path, tmp_path: Path) -> Path:
    """With all that a prune looks at: SFT trained again, DPO that continues the earlier one, leftovers."""
    make_run(runs, "sft.20261101-000000", "old")
    make_run(runs, "sft.20261102-000000", "older")
    make_run(runs, "dpo-onold", "o", "sft.20261101-000000")
    manifest = runs / "tiny/dpo-onold/manifest.json"  # it was called sft then
    manifest.write_text(manifest.read_text().replace("sft.20261101-000000_adapter", "sft_adapter"))
    for folder in ("export/dpo-gguf-q4_k_m.failed", "compare.unfinished", "export/.dpo-adapter.99.tmp"):
        (runs / "tiny" / folder).mkdir()
    (runs / "tiny/sft/.report.json.99.tmp").write_text("{")
    return runs


def found(runs: Path) -> tuple[set[str], list[str]]:
    going, kept = leftovers.find(runs, entries.find(runs))
    return {one.name for one in going}, kept


def test_pruning_takes_what_nothing_needs(pruned: Path) -> None:
    going, kept = found(pruned)
    assert going == {
        *("tiny/sft.20261102-000000", "tiny/export/dpo-gguf-q4_k_m.failed", "tiny/compare.unfinished"),
        *("tiny/export/.dpo-adapter.99.tmp", "tiny/sft/.report.json.99.tmp"),
    }
    assert kept == ["tiny/sft.20261101-000000 stays: tiny/dpo-onold continues it"]
    shutil.rmtree(pruned / "tiny/dpo-onold")
    assert "tiny/sft.20261101-000000" in found(pruned)[0]
    removal.remove(leftovers.find(pruned, entries.find(pruned))[0])
    assert found(pruned) == (set(), [])
    assert names(listed(pruned, "--sort", "name")) == [
        "dpo",
        "dpo-beta02",
        "eval",
        "export/dpo-beta02-adapter",
        "sft",
    ]


def test_pruning_leaves_what_is_being_written(pruned: Path) -> None:
    with RunDir(pruned, "tiny", "sft").locked(), RunDir(pruned, "tiny", "compare").locked():
        going, _ = found(pruned)
    assert not {"tiny/sft/.report.json.99.tmp", "tiny/compare.unfinished"} & going
    assert "tiny/export/.dpo-adapter.99.tmp" in going


def test_caches_go_once_no_run_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    now, day = time.time(), 24 * 3600.0
    ages = {"of-no-run": 50 * day, "unused": 35 * day, "of-a-run": 20 * day, "new": 60.0}
    for name, age in ages.items():
        rows, log_probs = caches.prepared_rows() / name, caches.log_probs() / f"{name}{caches.LOG_PROBS}"
        rows.mkdir(parents=True)
        log_probs.parent.mkdir(exist_ok=True)
        log_probs.write_bytes(b"x")
        for path in (rows, log_probs):
            os.utime(path, (now - age, now - age))
    for name, age in ((f"{caches.MAKING}dead", 2 * day), (f"{caches.MAKING}alive", 60.0)):
        (caches.prepared_rows() / name).mkdir()
        os.utime(caches.prepared_rows() / name, (now - age, now - age))
    runs = tmp_path / "runs"
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now - 40 * day))
    make_run(runs, "sft", started=started)
    both = {"data/of-no-run", "reference/of-no-run.logps", "data/unused", "reference/unused.logps"}
    assert found(runs)[0] == both | {f"data/{caches.MAKING}dead"}
    make_run(runs, "dpo", None, "sft", outcome="running", started=started)
    with RunDir(runs, "tiny", "dpo").locked():
        assert "data/unused" not in found(runs)[0], "a run that goes on may use it"
    shutil.rmtree(runs / "tiny")
    assert {"data/of-a-run", "reference/of-a-run.logps"} <= found(runs)[0]
    assert "data/new" not in found(runs)[0]
