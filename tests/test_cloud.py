"""cloud/sky.yaml held against the repository, and its `run` as a shell runs it. SkyPilot itself is not needed."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.test_setup import SECRET, executable
from toolkit.command import RUNS
from toolkit.recipe import stages

TEXT = (ROOT / "cloud/sky.yaml").read_text(encoding="utf-8")
TASK: dict[str, Any] = YAML(typ="safe").load(TEXT)
((VOLUME, _),) = TASK["volumes"].items()


def test_what_has_to_outlive_a_machine_is_on_the_volume_where_the_image_keeps_it() -> None:
    image = (ROOT / "Dockerfile").read_text()
    assert f"VOLUME:{VOLUME} " in image
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        assert f"{name}={TASK['envs'][name]}" in image and TASK["envs"][name].startswith(f"{VOLUME}/")
    assert f"ln -sfn {VOLUME}/{RUNS} {RUNS}" in TASK["run"]
    read = "\n".join(file.read_text() for file in (ROOT / "toolkit").rglob("*.py"))
    for name in ("XDG_CACHE_HOME", *TASK["secrets"]):
        assert f'"{name}"' in read, "a variable that nobody reads"
    assert not any(TASK["secrets"].values()) and not SECRET.search(TEXT)


def test_a_bucket_can_stand_in_the_place_of_the_volume() -> None:
    commented = re.search(r"^# file_mounts:\n(?:# .*\n)+", TEXT, re.MULTILINE)
    assert commented
    mounts = YAML(typ="safe").load(commented[0].replace("# ", "", 1).replace("\n# ", "\n"))["file_mounts"]
    ((path, bucket),) = mounts.items()
    assert path == f"{VOLUME}/{RUNS}" and bucket["mode"] == "MOUNT_CACHED"


def test_a_run_that_saved_at_sigterm_is_continued_and_set_up_as_everywhere() -> None:
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [128 + signal.SIGTERM]
    make, target = TASK["setup"].split()
    assert make == "make" and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    python = re.search(r"^FROM (python:[\d.]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert python and TASK["resources"]["image_id"].startswith(f"docker:{python[1]}-")
    assert all((ROOT / script).is_file() for script in re.findall(r"run_\w+\.py", TEXT))


ECHO = '#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" end >> called\nexit ${CODE:-0}\n'


def called(folder: Path, command: str, gpus: int = 1, nodes: int = 1, rank: int = 0, code: int = 0) -> Any:
    """(exit code, the words of every program that `run` started in .venv)."""
    for name in ("python", "torchrun"):
        (folder / ".venv").mkdir(exist_ok=True)
        executable(folder / ".venv" / "bin" / name, ECHO)
    (folder / "called").unlink(missing_ok=True)
    facts = {
        "NUM_GPUS_PER_NODE": gpus,
        "NUM_NODES": nodes,
        "NODE_RANK": rank,
        "NODE_IPS": "10.0.0.7\n10.0.0.8",
    }
    done = subprocess.run(
        ["bash", "-c", TASK["run"].replace(VOLUME, str(folder / "volume"))],
        cwd=folder,
        env=os.environ
        | {f"SKYPILOT_{name}": str(value) for name, value in facts.items()}
        | {"COMMAND": command, "RECIPE": "a recipe", "CODE": str(code)},
        timeout=60,
    )
    words = (folder / "called").read_text().split("end\n")[:-1] if (folder / "called").exists() else []
    assert (folder / RUNS).resolve() == folder / "volume" / RUNS
    return done.returncode, [one.splitlines() for one in words]


def test_the_command_that_stands_there_is_make_run(tmp_path: Path) -> None:
    code, words = called(tmp_path, TASK["envs"]["COMMAND"])
    options = ["--recipe", "a recipe"]
    assert code == 0 and words == [
        ["python", "run_sft.py", *options, "--if-present"],
        ["python", "run_dpo.py", *options, "--if-present"],
        ["python", "run_compare.py", *options],
    ]
    assert called(tmp_path, TASK["envs"]["COMMAND"], code=143) == (143, words[:1]), "it ends with the first"


@pytest.mark.parametrize("stage", [name for name in stages.names() if stages.of(name).across_processes])
def test_a_stage_takes_every_gpu(stage: str, tmp_path: Path) -> None:
    command = [f"run_{stage}.py", "--set", "a=[b, c]", "--on-finish", "echo '$X'"]
    line = shlex.join(["python", *command])  # as run_sweep.py --commands writes it
    assert called(tmp_path, line) == (0, [["python", *command]])
    assert called(tmp_path, line, gpus=0) == (0, [["python", *command]])
    assert called(tmp_path, line, gpus=2) == (
        0,
        [["torchrun", "--nproc_per_node=2", "--standalone", *command]],
    )
    several = ["--nproc_per_node=1", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.7"]
    assert called(tmp_path, line, nodes=2, rank=1) == (0, [["torchrun", *several, *command]])


@pytest.mark.parametrize("script", ["compare", "kto"])
def test_what_several_processes_cannot_do_runs_once(script: str, tmp_path: Path) -> None:
    line = f"python run_{script}.py --recipe x"
    assert called(tmp_path, line, gpus=4, nodes=2) == (0, [line.split()])
    assert called(tmp_path, line, gpus=4, nodes=2, rank=1) == (0, [])
