"""The allocator's one variable, chosen by the torch that is installed, before anything can read it."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from toolkit.env import allocator_variable

REPORT = """
import json, os
print(json.dumps([env.prepare("max_split_size_mb:128", False).to_dict(),
                  {name: os.environ.get(name) for name in env.ALLOCATOR_VARIABLES}]))
"""


def run(code: str, **exported: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTORCH_", "UNSLOTH_", "TOKENIZERS_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **exported}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("torch", "variable"),
    [
        ("2.9.1", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.0", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_variable_that_this_torch_reads(torch: str, variable: str) -> None:
    assert allocator_variable(torch) == variable


def test_the_recipe_sets_it_where_nobody_exported_one() -> None:
    [said, variables] = json.loads(run("from toolkit import env" + REPORT).stdout)
    assert said == {
        "alloc_variable": "PYTORCH_ALLOC_CONF",
        "alloc_conf": "max_split_size_mb:128",
        "alloc_source": "recipe",
    }
    assert variables == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_CUDA_ALLOC_CONF": None}


def test_an_exported_setting_wins_is_named_and_moves_to_the_variable_that_is_read() -> None:
    done = run("from toolkit import env" + REPORT, PYTORCH_CUDA_ALLOC_CONF="backend:native")
    [said, variables] = json.loads(done.stdout)
    assert said["alloc_source"] == "PYTORCH_CUDA_ALLOC_CONF" and said["alloc_conf"] == "backend:native"
    assert variables == {"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": None}


def test_a_library_that_is_already_loaded_is_named() -> None:
    done = run("import torch\nfrom toolkit import cli, env\ncli.run(lambda: env.prepare('a', False))")
    assert done.returncode == 2 and "torch was imported before the allocator could be set" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_engine_cannot_be_imported_unprepared() -> None:
    done = run("import toolkit.engine")
    assert done.returncode == 1 and "before toolkit.env.prepare()" in done.stderr


def test_the_loss_chunk_reaches_the_fused_head_on_a_gpu_alone_and_an_exported_one_wins() -> None:
    code = (
        "import json, os; from toolkit import env; env.prepare('a', {}, 0.5); "
        "names = (env.LOSS_CHUNK_VARIABLE, 'UNSLOTH_CE_LOSS_TARGET_GB', 'UNSLOTH_BLOCK_COMPILE'); "
        "print(json.dumps([os.environ.get(name) for name in names]))"
    )
    assert json.loads(run(code.format(True)).stdout) == ["0.5", None, "0"]
    assert json.loads(run(code.format(False)).stdout) == [None, None, None]
    assert json.loads(run(code.format(True), UNSLOTH_LOGPROB_CHUNK_GB="2").stdout) == ["2", None, "0"]


@pytest.mark.parametrize(("exported", "inside"), [({}, "true"), ({"TOKENIZERS_PARALLELISM": "0"}, "0")])
def test_the_tokenizer_has_threads_only_where_it_is_given_them_unless_a_setting_was_exported(
    exported: dict[str, str], inside: str
) -> None:
    code = (
        "import os; from toolkit import env; env.prepare('a', False); name = env.TOKENIZER_THREADS\n"
        "os.environ.setdefault(name, 'false')  # as Unsloth's import does\n"
        "before = os.environ[name]\n"
        "with env.tokenizer_threads(): print(os.environ[name])\n"
        "assert os.environ[name] == before"
    )
    done = run(code, **exported)
    assert (done.returncode, done.stdout.strip()) == (0, inside), done.stderr
