"""Requirements, Makefile, Dockerfile, .ci/run and the shipped recipes, held against each other. Installs nothing."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from toolkit.doctor.machine import PYTHONS
from toolkit.hardware import CUDA12_INDEX, OLDEST_DRIVER
from toolkit.recipe.load import RECIPES, load, names

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = sorted(path.name for path in ROOT.glob("requirements*.txt"))
PINNED = re.compile(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+")
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?:TOKEN|KEY|PASSWORD|SECRET)\s*=\s*['\"]?[A-Za-z0-9_-]{8,}")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> dict[str, str]:
    """Normalised package name -> the whole line."""
    lines = [line.partition(" #")[0].strip() for line in text(name).splitlines()]
    return {
        line.partition("==")[0].lower().replace("_", "-").replace(".", "-"): line
        for line in lines
        if line and not line.startswith("#")
    }


def pip_steps(name: str) -> list[str]:
    """The options of each `pip install` in a file, in order; which index a variable names is left out."""
    found = re.findall(r"(?:\$\(PIP_INSTALL\)|python -m pip install) (-.*?\.txt)(?=;| \\|\n)", text(name))
    return [re.sub(r'"\$[^"]*"', "INDEX", step.strip()) for step in found]


# Requirements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_pinned(name: str) -> None:
    loose = [line for line in requirements(name).values() if not PINNED.fullmatch(line)]
    assert not loose


def test_no_package_is_pinned_twice() -> None:
    names = [package for name in REQUIREMENTS for package in requirements(name)]
    assert len(names) == len(set(names))


def test_the_unsloth_pair_has_one_version() -> None:
    assert len({line.partition("==")[2] for line in requirements("requirements-unsloth.txt").values()}) == 1


# Make ------------------------------------------------------------------------------------------------------

STUB = """#!/bin/sh
# Stands in for a Python: answers the version check, makes a venv of itself, writes down what pip was asked, and loads
# xFormers unless it is BROKEN.
case "$1 $2" in
  "-c from xformers"*) test -z "$BROKEN" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    test "$3" = install || echo "$3" >> pip.log
    shift 3; echo "$@" >> pip.log
    test -z "$FAIL" || case "$*" in *"$FAIL"*) exit 1 ;; esac ;;
  *) echo 1 ;;
esac
"""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, and a bin/ of stand-ins to put first on the PATH."""
    for name in ("Makefile", *REQUIREMENTS):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        executable(
            tmp_path / "bin" / name, "#!/bin/sh\necho 'the shim knows no such version' >&2; exit 127\n"
        )
    return tmp_path


def executable(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    path.chmod(0o755)


def make(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *words],
        cwd=checkout,
        env=clean | {"PATH": path, "NVIDIA": "", "PYTHON": ""} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def asked_of_pip(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.replace("--disable-pip-version-check ", "") for line in lines]


CPU_STEPS = ["-r requirements.txt", "--no-deps -r requirements-unsloth.txt"]
TORCH_STEP = "--no-deps --index-url INDEX torch -c requirements.txt"
GPU_STEP = "-c requirements.txt -r requirements-gpu.txt"
XFORMERS_STEP = "--no-deps --index-url INDEX -r requirements-xformers.txt"
CUDA13_INDEX = "https://download.pytorch.org/whl/cu130"
OPTIONAL_STEP = "-c requirements.txt -r requirements-optional.txt"
QUANTISE_STEP = "--no-deps -r requirements-quantise.txt"
OPTIONAL_STEPS = [OPTIONAL_STEP, QUANTISE_STEP]
DEV_STEP = "-r requirements-dev.txt"
ALL_STEPS = [*CPU_STEPS, *OPTIONAL_STEPS, DEV_STEP]


@needs_make
def test_run_takes_the_stages_that_are_named_and_compares_at_the_end(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    for script in ROOT.glob("run_*.py"):
        shutil.copy(script, checkout)
    for words, expected in (
        ([], ["sft", "dpo", "compare"]),
        (["STAGES=kto"], ["kto", "compare"]),
        (["STAGES=sft,reward,kto", "RECIPE=mine"], ["sft", "reward", "kto", "compare"]),
    ):
        done = make(checkout, "run", *words)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"run_(\w+)\.py --recipe", done.stdout) == expected
    for wrong in ("STAGES=sft,dpp", "STAGES=compare", "STAGES="):
        (checkout / "pip.log").write_text("")
        refused = make(checkout, "run", wrong)
        assert refused.returncode == 2 and not asked_of_pip(checkout) and not refused.stdout
        [line] = refused.stderr.splitlines()
        assert f"{wrong}: name one or more of sft dpo reward kto" in line


@needs_make
def test_setup_takes_the_first_python_that_runs_and_installs_once(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    first, second = make(checkout, "setup"), make(checkout, "setup")
    assert "making .venv with python3.12" in first.stdout
    assert first.returncode == second.returncode == 0
    assert asked_of_pip(checkout) == CPU_STEPS


def gpu_steps(index: str) -> list[str]:
    """What is installed on a machine with a GPU; torch is from `index`, "" is PyPI."""
    torch = [TORCH_STEP.replace("INDEX", index)] if index else []
    return [*torch, *CPU_STEPS, GPU_STEP, XFORMERS_STEP.replace("INDEX", index or CUDA13_INDEX)]


@needs_make
@pytest.mark.parametrize(
    ("driver", "index"),
    [("595", ""), ("580", ""), ("579", CUDA12_INDEX), ("550", CUDA12_INDEX), ("525", CUDA12_INDEX), ("", "")],
)
def test_the_driver_chooses_the_build_of_torch(checkout: Path, driver: str, index: str) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    done = make(checkout, "setup", NVIDIA="yes", DRIVER=driver)
    assert done.returncode == 0
    assert asked_of_pip(checkout) == gpu_steps(index)
    assert "attention: xFormers" in done.stdout


@needs_make
def test_an_index_that_is_named_wins_and_moves_what_is_installed(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    mirror = "https://mirror.example/cu126"
    make(checkout, "setup", NVIDIA="yes", DRIVER="580")
    (checkout / "pip.log").unlink()
    make(checkout, "setup", f"TORCH_INDEX={mirror}", NVIDIA="yes", DRIVER="580")
    assert asked_of_pip(checkout) == ["uninstall", "-y torch xformers", *gpu_steps(mirror)]
    make(checkout, "setup", f"TORCH_INDEX={mirror}", NVIDIA="yes", DRIVER="580")
    make(checkout, "setup", NVIDIA="yes", DRIVER="580")
    assert len(asked_of_pip(checkout)) == 2 + len(gpu_steps(mirror)), (
        "the choice stays, unless another is named"
    )
    (checkout / "pip.log").unlink()
    make(checkout, "setup", "TORCH_INDEX=", NVIDIA="yes", DRIVER="580")
    assert asked_of_pip(checkout) == ["uninstall", "-y torch xformers", *gpu_steps("")]


@needs_make
@pytest.mark.parametrize("broken", [{"BROKEN": "1"}, {"FAIL": "requirements-xformers.txt"}])
def test_an_xformers_that_does_not_load_is_left_out(checkout: Path, broken: dict[str, str]) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    done = make(checkout, "setup", NVIDIA="yes", DRIVER="580", **broken)
    assert done.returncode == 0
    assert asked_of_pip(checkout) == [*gpu_steps(""), "uninstall", "-y xformers"]
    assert "attention: torch's SDPA; xFormers is left out" in done.stdout


@needs_make
@pytest.mark.parametrize("target", ["test", "test-long", "lint"])
def test_only_tests_and_lint_add_the_optional_packages_and_the_tools(checkout: Path, target: str) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    assert make(checkout, "run").returncode == 0
    assert asked_of_pip(checkout) == CPU_STEPS
    assert make(checkout, "optional").returncode == 0
    assert asked_of_pip(checkout) == ALL_STEPS[:-1]
    assert make(checkout, target).returncode == make(checkout, "run").returncode == 0
    assert asked_of_pip(checkout) == ALL_STEPS


@needs_make
def test_setup_refuses_a_driver_for_neither_build_before_it_downloads(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    refused = make(checkout, "setup", NVIDIA="yes", DRIVER="470")
    assert refused.returncode
    for words in (
        "driver here is 470",
        "580 or newer",
        "525 or newer",
        CUDA12_INDEX,
        "make setup TORCH_INDEX=",
    ):
        assert words in refused.stderr
    assert not asked_of_pip(checkout)
    assert make(checkout, "setup", "TORCH_INDEX=", NVIDIA="yes", DRIVER="470").returncode == 0


def test_drivers_indexes_and_pythons_are_the_toolkits() -> None:
    makefile, dockerfile = text("Makefile"), text("Dockerfile")
    assert f"CUDA13_DRIVER := {OLDEST_DRIVER[13]}\nCUDA12_DRIVER := {OLDEST_DRIVER[12]}\n" in makefile
    assert f"CUDA12_INDEX := {CUDA12_INDEX}\n" in makefile
    assert f"CUDA13_INDEX := {CUDA13_INDEX}\n" in makefile and f"TORCH_INDEX:-{CUDA13_INDEX}}}" in dockerfile
    assert (
        f"driver {OLDEST_DRIVER[13]} or newer" in dockerfile and f"from {OLDEST_DRIVER[12]} on" in dockerfile
    )
    assert f"TORCH_INDEX={CUDA12_INDEX}" in dockerfile
    oldest, newest = PYTHONS
    assert f"{oldest} <= sys.version_info[:2] <= {newest}" in makefile
    for page in ("README.md", "docs/runs.md", "docs/troubleshooting.md"):
        assert f"driver {OLDEST_DRIVER[12]} or newer" in text(page)


@needs_make
@pytest.mark.parametrize("target", ["setup", "test"])
@pytest.mark.parametrize("step", ALL_STEPS)
def test_an_install_that_broke_off_is_taken_up_again(checkout: Path, step: str, target: str) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    assert make(checkout, "test", FAIL=step.split()[-1]).returncode
    (checkout / "pip.log").unlink()
    first = next(
        steps[0] for steps in (CPU_STEPS, OPTIONAL_STEPS, [DEV_STEP]) if step in steps
    )  # of its stamp
    missing = ALL_STEPS[ALL_STEPS.index(first) :]
    assert make(checkout, target).returncode == 0
    assert asked_of_pip(checkout) == [step for step in missing if target == "test" or step in CPU_STEPS]


@needs_make
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("requirements.txt", ALL_STEPS),
        ("requirements-optional.txt", [*OPTIONAL_STEPS, DEV_STEP]),
        ("requirements-quantise.txt", [*OPTIONAL_STEPS, DEV_STEP]),
        ("requirements-dev.txt", [DEV_STEP]),
    ],
)
def test_changed_requirements_are_installed_with_what_builds_on_them(
    checkout: Path, name: str, steps: list[str]
) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    make(checkout, "test")
    later = (checkout / ".venv" / ".installed-dev").stat().st_mtime + 0.01
    os.utime(checkout / name, (later, later))
    make(checkout, "test")
    assert asked_of_pip(checkout) == [*ALL_STEPS, *steps]


@needs_make
def test_a_venv_whose_interpreter_is_gone_is_made_again(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    make(checkout, "test")
    (checkout / ".venv" / "bin" / "python").unlink()
    assert make(checkout, "test").returncode == 0
    assert asked_of_pip(checkout) == ALL_STEPS * 2


@needs_make
@pytest.mark.parametrize("words", [[], ["PYTHON=no-such-python"]])
def test_without_a_python_there_is_one_clear_message(checkout: Path, words: list[str]) -> None:
    got = make(checkout, "setup", *words)
    assert got.returncode
    assert "No Python 3.11, 3.12 or 3.13 that runs" in got.stderr
    assert "make setup PYTHON=" in got.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_run_goes_through_the_three_scripts(checkout: Path) -> None:
    executable(checkout / "bin" / "python3.12", STUB)
    make(checkout, "setup")
    lines = make(checkout, "-n", "run", "RECIPE=llama31_8b", "ARGS=--set dpo.beta=0.2").stdout.splitlines()
    options = '--recipe "llama31_8b"'
    assert [line.partition("bin/python ")[2] for line in lines] == [
        f"run_sft.py {options} --if-present --set dpo.beta=0.2",
        f"run_dpo.py {options} --if-present --set dpo.beta=0.2",
        f"run_compare.py {options} --set dpo.beta=0.2",
    ]


# Docker and CI ---------------------------------------------------------------------------------------------


def test_the_image_is_installed_like_the_makefile_does() -> None:
    makefile, image = pip_steps("Makefile"), pip_steps("Dockerfile")
    assert makefile == [TORCH_STEP, *CPU_STEPS, GPU_STEP, XFORMERS_STEP, *OPTIONAL_STEPS, DEV_STEP]
    assert image == makefile[:-1], "the tools for tests stay out of the image, all else is the same"
    (proof,) = re.findall(r"^XFORMERS_LOADS := (.*)$", text("Makefile"), re.MULTILINE)
    assert f"python -c '{proof}'" in text("Dockerfile")


def test_the_build_context_holds_what_the_image_copies() -> None:
    copied = re.findall(r"^COPY (.*)$", text("Dockerfile"), re.MULTILINE)
    sources = {source for line in copied for source in line.split()[:-1]}
    lines = text(".dockerignore").splitlines()
    assert lines[lines.index("*") - 1].startswith("#"), "everything is left out first"
    assert sources == {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert all(any(ROOT.glob(source)) for source in sources)


def test_ci_is_executable_and_runs_what_people_run() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    lines = text(".ci/run").splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == [
        "make lint",
        "make test ARGS=\"-m 'not campaign' --dist=worksteal\"",  # what is `long` too
    ]


def test_the_workflow_builds_this_image_for_both_drivers() -> None:
    workflow = YAML(typ="safe").load(text(".github/workflows/image.yml"))
    job = workflow["jobs"]["build"]
    indices = {one["tag"]: one["torch_index"] for one in job["strategy"]["matrix"]["include"]}
    assert indices == {"latest": "", "cuda12": CUDA12_INDEX}
    (build,) = (step["with"] for step in job["steps"] if "build-push" in step.get("uses", ""))
    argument, _, value = build["build-args"].partition("=")
    assert f"\nARG {argument}=\n" in text("Dockerfile") and value == "${{ matrix.torch_index }}"
    assert workflow["permissions"] == {"contents": "read", "packages": "write"}


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile", ".ci/run", "pyproject.toml", *REQUIREMENTS])
def test_no_secret_stands_in_a_set_up_file(name: str) -> None:
    assert not SECRET.search(text(name))


# Recipes ---------------------------------------------------------------------------------------------------

EXPLAINED = ("lora", "memory", "sft", "dpo", "reward", "kto", "rl")


@pytest.mark.parametrize("name", names())
def test_recipe_loads(name: str) -> None:
    loaded = load(name)
    end, pad = loaded.template.end_of_turn, loaded.template.pad_token
    assert loaded.name == name
    assert end != pad
    assert loaded.template.file == "tokenizer" or (RECIPES / loaded.template.file).is_file()


@pytest.mark.parametrize("name", names())
def test_every_value_of_a_recipe_has_its_reason_beside_it(name: str) -> None:
    lines = text(f"recipes/{name}.yaml").splitlines()
    values = YAML().load(text(f"recipes/{name}.yaml"))
    bare = [
        f"{section}.{key}"
        for section in EXPLAINED
        for key, value in (values.get(section) or {}).items()
        if not (is_list_of_sources(value) or has_comment(lines, values[section].lc.key(key)[0]))
    ]
    assert not bare, "a number without a source or a reason"


def is_list_of_sources(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def has_comment(lines: list[str], line: int) -> bool:
    """On the line, or on the lines just above it."""
    return " # " in lines[line] or lines[line - 1].lstrip().startswith("# ")


@pytest.mark.parametrize("name", names())
def test_a_prompt_is_compared_once(name: str) -> None:
    prompts = load(name).compare.prompts
    assert len(prompts) == len(set(prompts))
