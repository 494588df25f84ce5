"""--on-finish: told of every end, with what is known; it changes nothing of that end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_run_page import make_run
from toolkit import cli
from toolkit.errors import Interrupted, UserError
from toolkit.redaction import redacted
from toolkit.report import on_finish
from toolkit.run.rundir import RunDir

ENDS: list[tuple[BaseException | None, str, int]] = [
    (None, "finished", 0),
    (UserError("the disk is full"), "failed", 2),
    (Interrupted(15, "stopped at step 7"), "interrupted", 143),
    (KeyboardInterrupt(), "interrupted", 130),
    (RuntimeError("a fault"), "failed", 1),
]


def begin() -> None:
    cli.start("sft", "")


def ended(
    command: str, error: BaseException | None = None, facts: Callable[[], dict[str, Any]] = dict
) -> int:
    """The exit code of a script that asks for this command and ends so."""

    def main() -> None:
        on_finish.ask(command, facts)
        if error:
            raise error

    try:
        cli.run(main)
    except SystemExit as end:
        return int(end.code or 0)
    except RuntimeError:
        return 1
    return 0


@pytest.mark.parametrize(("error", "outcome", "code"), ENDS, ids=lambda value: str(value))
def test_however_a_run_ends_the_command_is_told_and_the_exit_code_stays(
    error: BaseException | None, outcome: str, code: int, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    run = make_run(tmp_path, "dpo", 40)
    assert ended(f"env | grep ^FINETUNE_ > {told}; exit 3", error, lambda: on_finish.of_run(run)) == code
    values = dict(line.split("=", 1) for line in told.read_text().splitlines())
    assert values == {
        "FINETUNE_OUTCOME": outcome,
        "FINETUNE_REASON": "" if error is None else str(error),
        "FINETUNE_NAME": "big/dpo",
        "FINETUNE_DIR": str(run.path),
        "FINETUNE_STEPS": "40",
        "FINETUNE_LOSS": values["FINETUNE_LOSS"],
        "FINETUNE_SECONDS": "",
    }
    assert float(values["FINETUNE_LOSS"]) > 0


def test_its_own_failure_is_one_line_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUSH_TOKEN", "0123456789abcdef")
    assert ended('echo first; echo "401 for $PUSH_TOKEN"; exit 4') == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == "--on-finish failed: exit code 4: 401 for ***\n"
    monkeypatch.setattr(on_finish, "LONGEST_SECONDS", 0.2)
    assert ended("sleep 60", UserError("no rows")) == 2
    assert (
        capsys.readouterr().err
        == "error: no rows\n--on-finish failed: it took more than 0.2 s and was ended\n"
    )


def test_what_it_is_told_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "0123456789abcdef")
    told = tmp_path / "told"
    ended(f'echo "$FINETUNE_REASON" > {told}', UserError("401 for 0123456789abcdef"))
    assert told.read_text() == "401 for ***\n"


def test_the_address_of_a_webhook_is_a_secret() -> None:
    said = redacted("run_sft.py --on-finish 'curl https://hooks.slack.com/services/T0/B0/aBc -d done'")
    assert said == "run_sft.py --on-finish 'curl https://hooks.slack.com/*** -d done'"


def test_a_script_that_only_looks_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    words = ["--recipe", "tiny", "--plan", "--runs", str(tmp_path), "--on-finish", f"touch {told}"]
    monkeypatch.setattr(sys, "argv", ["run_sft.py", *words])
    cli.run(begin)
    assert not told.exists()


def test_a_run_that_cannot_begin_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    words = ["--recipe", "tiny", "--runs", str(tmp_path), "--set", "sft.bta=1"]
    monkeypatch.setattr(
        sys, "argv", ["run_sft.py", *words, "--on-finish", f'echo "$FINETUNE_OUTCOME" > {told}']
    )
    with pytest.raises(SystemExit):
        cli.run(begin)
    assert told.read_text() == "failed\n"
    assert RunDir(tmp_path, "tiny", "sft").path.exists() is False
