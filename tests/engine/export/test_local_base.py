"""A model of one's own folders goes the whole way: trained, compared, evaluated, exported, described."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import ROOT
from tests.engine.conftest import FEW_ROWS, run_stage
from toolkit.compare import candidates
from toolkit.data.prompts import read_prompts
from toolkit.engine.export import export
from toolkit.engine.inference import compare, evaluate
from toolkit.evaluation import scope
from toolkit.export import artefact
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.run.rundir import RunDir

QUICK = (
    *FEW_ROWS,
    "sft.max_steps=1",
    "compare.questions=null",
    "compare.prompts=[Who?]",
    "dpo=null",
    "reward=null",
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of a folder that is quantised already, by a link with blanks; its 16 bits lie at home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes/tiny/base", tmp_path / "home/my base")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "home/my base", quantization_config=nf4, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes/tiny/base" / name, tmp_path / "packed")
    (tmp_path / "a link to it").symlink_to(tmp_path / "packed")
    base = ("model.path=a link to it", "model.base_16bit=~/my base")
    return load("tiny", (*QUICK, *base))


def options(add: object, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    add(parser)  # type: ignore[operator]
    return parser.parse_args([*words, "--runs", "runs"])


@pytest.mark.long
def test_a_packed_folder_behind_a_link_goes_the_whole_way(recipe: Recipe, tmp_path: Path) -> None:
    quiet, runs = Console(quiet=True), Path("runs")
    done = run_stage(recipe, "sft", runs)
    assert done.report["num_steps"] == 1
    run = RunDir(runs, recipe.name, "compare")
    compare.run(recipe, run, candidates.choose(recipe, run, None), read_prompts(recipe, None), quiet, False)
    assert (run.path / "comparison.html").is_file()
    run = RunDir(runs, recipe.name, "eval")
    evaluation = evaluate.run(recipe, run, scope.choose(recipe, run, options(scope.add_options)), quiet)
    assert evaluation.models and evaluation.models.keys() == {"base", "sft"}
    words = ("--stage", "sft", "--format", "merged_16bit", "--no-verify")
    wanted = artefact.wanted(recipe, options(artefact.add_options, *words))
    export.run(wanted, quiet)
    card = (wanted.folder / "README.md").read_text()
    assert "a link to it (a folder, not on the Hub)" in card and str(tmp_path) not in card
    assert "quantization_config" not in json.loads((wanted.folder / "config.json").read_text())
    assert os.path.samefile(wanted.base_16bit, tmp_path / "home/my base")
