"""The scripts as a user meets them: options, plans, mistakes. None of it needs torch."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import ROOT
from toolkit import cli, env
from toolkit.errors import UserError
from toolkit.recipe.load import load, names
from toolkit.records.marks import Made
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import SEAL, seal

STAGES = [(name, stage) for name in names() for stage in ("sft", "dpo", "reward", "kto", "rl")]


# A script that ends with torch loaded took seconds for what should take one.
LIGHT = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "datasets", "transformers"} & set(sys.modules), "something heavy was loaded"
"""


def script(
    name: str, *arguments: object, cwd: Path = ROOT, light: bool = False
) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / f"run_{name}.py"), *map(str, arguments)]
    command = [sys.executable, *(["-c", f"import sys; sys.argv = {words!r}{LIGHT}"] if light else words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def mistake(name: str, *arguments: object, cwd: Path = ROOT, light: bool = False) -> str:
    """stderr of a run that the user can fix: exit code 2 and no traceback; `light`: torch is never loaded."""
    done = script(name, *arguments, cwd=cwd, light=light)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto", "rl", "compare"])
def test_help_shows_the_usage(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0 and f"python run_{name}.py --recipe tiny" in done.stdout


@pytest.mark.parametrize(("recipe", "stage"), STAGES, ids=lambda value: str(value))
def test_every_shipped_recipe_is_planned_on_its_card(recipe: str, stage: str) -> None:
    done = script(stage, "--recipe", recipe, "--plan", "--json", "--if-present")
    assert done.returncode == 0, done.stderr
    if "nothing to do" not in done.stdout:
        plan = json.loads(done.stdout)
        assert plan["fits"] and plan["peak_gib"] <= plan["budget_gib"]
        assert {"items_gib", "settings"} <= plan.keys()


def test_a_plan_answers_without_torch() -> None:
    done = script("dpo", "--recipe", "llama31_8b", "--plan", light=True)
    assert done.returncode == 0, done.stderr
    assert "mlabonne/orpo-dpo-mix-40k" in done.stdout and "predicted memory" in done.stdout


def test_a_card_that_is_too_small_gets_what_would_mend_it() -> None:
    said = mistake("dpo", "--recipe", "llama31_8b", "--plan", "--gpu", "6")
    assert "does not fit" in said and "(1) a larger card, a5000" in said and "(2) --set lora.r=8" in said
    assert "did you mean rtx4090" in mistake("dpo", "--recipe", "llama31_8b", "--plan", "--gpu", "rtx409")


def test_a_recipe_for_a_gpu_is_not_begun_without_one(tmp_path: Path) -> None:
    from tests.conftest import HAS_GPU

    if HAS_GPU:
        pytest.skip("there is a GPU here")
    assert "--set gpu=null" in mistake("sft", "--recipe", "llama31_8b", "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "tyni"), "did you mean tiny"),
        (("--recipe", "tiny", "--set", "dpo.bta=1", "--set", "seed=x"), "did you mean 'beta'"),
        (("--recipe", "tiny", "--set", "dpo=null"), "recipe tiny has no dpo stage"),
        (("--recipe", "tiny"), "run_sft.py --recipe tiny` first"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    assert said in mistake("dpo", *arguments, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_nothing_to_compare_names_the_commands(tmp_path: Path) -> None:
    assert "run_sft.py --recipe tiny --runs" in mistake("compare", "--recipe", "tiny", "--runs", tmp_path)
    said = mistake("compare", "--recipe", "tiny", "--prompts", tmp_path / "none.txt")
    assert f"there is no such file as {tmp_path}/none.txt" in said and "one prompt a line" in said
    assert "--questions goes with --prompts" in mistake("compare", "--recipe", "tiny", "--questions")


@pytest.mark.long
def test_a_model_that_cannot_be_reached_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = mistake(
        "sft", "--recipe", "tiny", "--set", "model.path=nobody/nothing", "--runs", tmp_path / "runs"
    )
    assert "model nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set" in said


def test_an_unfinished_run_keeps_the_settings_that_a_plan_once_chose(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    run.start(load("tiny").trajectory("sft"))
    run.hold_to({"memory.per_device_train_batch_size": 4, "memory.recompute_layers": 2})
    command = [
        sys.executable,
        str(ROOT / "run_sft.py"),
        "--recipe",
        "tiny",
        "--runs",
        str(tmp_path),
        "--plan",
    ]

    def settings(*more: str) -> tuple[int, int]:
        done = subprocess.run([*command, "--json", *more], capture_output=True, text=True, check=True)
        chosen = json.loads(done.stdout)["settings"]
        return chosen["per_device_train_batch_size"], chosen["recompute_layers"]

    assert settings() == (16, 0), "nothing is trained yet"
    (run.checkpoints / "checkpoint-5").mkdir(parents=True)
    seal(
        run.checkpoints / "checkpoint-5",
        SEAL,
        Made(trajectory=load("tiny").trajectory("sft"), conditions=None),
    )
    assert settings() == (4, 2)
    assert "after step 5" in script("sft", "--recipe", "tiny", "--runs", tmp_path, "--plan").stdout
    assert settings("--set", "memory.recompute_layers=1") == (4, 1), "to be refused with both values"
    assert settings("--fresh") == (16, 0)


def test_a_plan_says_all_that_would_keep_the_run_from_starting(tmp_path: Path) -> None:
    """Data, template, tokens and the lock; nothing of it takes torch."""
    overrides = (
        "sft.datasets.0.path=gone.jsonl",
        "template.file=gone.jinja",
        "template.pad_token=<|end_of_text|>",
    )
    words = [word for override in overrides for word in ("--set", override)]
    with RunDir(tmp_path, "tiny", "sft").locked():
        said = mistake("sft", "--recipe", "tiny", "--runs", tmp_path, "--plan", *words, light=True)
    beside, here = ROOT / "recipes", Path.cwd()
    for part in (
        f"No file at gone.jsonl (looked in {beside} and {here})",
        f"there is no chat template gone.jinja (looked in {beside} and {here})",
        "template.pad_token '<|end_of_text|>' is also an end token",
        f"{tmp_path}/tiny/sft is in use by process {os.getpid()}",
    ):
        assert part in said
    assert "is in use by process" not in mistake("dpo", "--recipe", "tiny", "--runs", tmp_path, light=True)


def test_a_preview_that_cannot_be_had_says_so_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = mistake("sft", "--recipe", "llama31_8b", "--preview", light=True)
    assert "Meta-Llama-3.1-8B-bnb-4bit is not in the local cache" in said
    assert "mlabonne/FineTome-100k is not in the local cache" in said and "orpo" not in said


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = command.replace("run_", f"{sys.executable} {ROOT}/run_")
    return subprocess.run(
        ["bash", "-c", words], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("run_sft.py --recipe tiny --plan >&-", 0),
        ("run_sft.py --recipe tiny --plan --json >&- 2>&-", 0),
        ("run_sft.py --recipe tyni --plan >&- 2>&-", 2),
        ("run_sft.py --recipe tiny --plan", 0),
        ("run_sft.py --recipe tiny --runs nowhere/[/b] --plan", 0),
        ("run_report.py --recipe tiny --runs /nowhere/[/b]", 2),
        ("run_sft.py --recipe tiny --set 'sft.datasets.0.path=/nowhere/[/b]'", 2),
        ("run_sft.py --recipe tiny --set 'sft.datasets.0.filter=\"[/b] == 1\"'", 2),
        ("run_sft.py --recipe tiny --json", 2),
        ("run_sft.py --recipe tiny --gpu 24", 2),
        ("run_sft.py --recipe tiny --world 2", 2),
        ("run_sft.py --recipe tiny --plan --world 2", 0),
        ("run_sft.py --recipe tiny --plan --world 3", 2),
        ("run_kto.py --recipe tiny --plan --world 2", 2),
        ("ulimit -v 2000000; run_sft.py --recipe tiny --runs /nowhere", 2),
    ],
)
def test_no_shell_gets_a_traceback(command: str, code: int) -> None:
    done = shell(command, PYTHONIOENCODING="ascii", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_brackets_in_a_path_are_shown_as_they_are() -> None:
    assert "x[/b]/tiny" in mistake("report", "--recipe", "tiny", "--runs", "/nowhere/[red]x[/b]")


def test_libraries_are_imported_without_the_garbage_collector_which_then_leaves_them_alone() -> None:
    try:
        with pytest.raises(ImportError), cli.importing(Console(quiet=True)):
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_memory_that_runs_out_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2 and "out of memory (libtorch_cpu.so" in capsys.readouterr().err


def test_sigterm_takes_away_what_was_begun_and_says_so(tmp_path: Path) -> None:
    code = (
        "import tempfile, time; from toolkit import cli\n"
        "def main():\n"
        f"    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(600)\n"
        "cli.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.communicate()[1] == "stopped by SIGTERM: nothing was saved as finished\n"
    assert process.returncode == 143 and not list(tmp_path.iterdir())


def test_a_plan_says_time_and_cost_between_two_rates() -> None:
    words = ("--recipe", "llama31_8b", "--plan", "--price", "0.69")
    said = " ".join(script("sft", *words, "--set", "sft.max_steps=1000").stdout.split())
    assert "the run of full rows: 1 h 41 min at the card's full rate" in said and "at 20% of it" in said
    assert "Costs 1.17 to 5.84 at 0.69 an hour" in said
    assert "1,000 steps of full rows: " in " ".join(script("sft", *words).stdout.split())
    assert "memory.price_per_hour" in mistake(
        "sft", "--recipe", "tiny", "--plan", "--price", "much", light=True
    )


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="set HOME, or XDG_CACHE_HOME"):
        env.cache_folder()
