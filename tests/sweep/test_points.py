"""Which runs --vary asks for, under which names, and what it refuses."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import mistake, script
from toolkit import cli
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.run.start import on_the_model_itself
from toolkit.sweep import points

VALUES = "sft-target-modulesk-proj-v-proj"  # more than one in a list


def asked(*words: str, stage: str = "dpo") -> points.Asked:
    parser = argparse.ArgumentParser()
    points.add_options(parser)
    options = ["--stage", stage, *words]
    arguments = parser.parse_args(options)
    arguments.recipe, arguments.set, arguments.runs = "tiny", [], Path("runs")
    return points.asked(arguments)


def test_every_combination_is_a_variant_named_by_its_values() -> None:
    sweep = asked("--vary", "dpo.beta=0.05,0.2", "--vary", "seed=1,2")
    assert [point.name for point in sweep.points] == [
        "dpo-beta0p05-seed1",
        "dpo-beta0p05-seed2",
        "dpo-beta0p2-seed1",
        "dpo-beta0p2-seed2",
    ]
    assert [point.recipe.dpo.beta for point in sweep.points if point.recipe.dpo] == [0.05, 0.05, 0.2, 0.2]
    assert sweep.folder == Path("runs/tiny/sweeps/dpo-beta-seed")
    assert sweep.record({}).varied == {"dpo.beta": ["0.05", "0.2"], "seed": ["1", "2"]}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--vary", "sft.learning_rate=1e-3,2.5e-3"], ["sft-learning-rate1e-3", "sft-learning-rate2p5e-3"]),
        (["--vary", "lora.target_modules=[q_proj],[k_proj,v_proj]"], ["sft-target-modulesq-proj", VALUES]),
        (["--vary", "lora.r=8,16", "--name", "rank"], ["sft-rank-r8", "sft-rank-r16"]),
    ],
)  # fmt: skip
def test_names_are_names_of_folders(words: list[str], names: list[str]) -> None:
    assert [point.name for point in asked(*words, stage="sft").points] == names


@pytest.mark.parametrize(
    "words",
    [
        ["--stage", "dpo", "--vary", "dpo.beta=0.05,0.2", "--vary", "seed=1,2", "--set", "dpo.max_rows=9"],
        ["--stage", "sft", "--vary", "lora.target_modules=[q_proj],[k_proj, v_proj]", "--name", "rank"],
        ["--stage", "dpo", "--vary", "seed=1,2", "--from", "base", "--quiet", "--on-finish", "echo '$X'"],
    ],
)
def test_the_command_of_a_run_makes_the_run_that_the_sweep_looks_for(words: list[str]) -> None:
    words = ["--recipe", "tiny", "--runs", "/big disk/runs", *words]
    parser = cli.options("")
    points.add_options(parser)
    sweep = points.asked(parser.parse_args(words))
    done = script("sweep", *words, "--commands", light=True)
    assert done.returncode == 0 and not done.stderr
    for line, point in zip(done.stdout.splitlines(), sweep.points, strict=True):
        python, called, *options = shlex.split(line)
        given = cli.stage_options("").parse_args(options)
        recipe = load(given.recipe, tuple(given.set))
        recipe = on_the_model_itself(recipe, sweep.stage) if given.from_ else recipe
        assert (python, called, str(given.runs)) == ("python", f"run_{sweep.stage}.py", "/big disk/runs")
        assert (stages.variant(sweep.stage, given.name), recipe) == (point.name, point.recipe)
        assert (given.quiet, given.on_finish) == ((True, "echo '$X'") if "base" in words else (False, None))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "dpo.bta=1,2"], "error: --vary dpo.bta: unknown key; did you mean 'beta'?"),
        (["--vary", "dpo.beta=0.1,0.10"], "would be the same run"),
        (["--vary", "dpo.beta=0.1,0.2", "--fresh"], "would begin anew each time"),
        (["--vary", "dpo.beta=0.1,0.2", "--plan"], "not allowed with"),
    ],
)
def test_what_has_no_commands_is_told_and_none_is_printed(words: list[str], said: str) -> None:
    done = script("sweep", "--recipe", "tiny", "--stage", "dpo", "--commands", *words, light=True)
    assert (done.returncode, done.stdout) == (2, "") and said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "dpo.beta"], "expected PATH=A,B,C"),
        (["--vary", "dpo.bta=1,2"], "--vary dpo.bta: unknown key; did you mean 'beta'?"),
        (["--vary", "dpo.beta=0.1,x"], "--vary dpo.beta: got 'x'"),
        (["--vary", "dpo.beta=0.1,0.10"], "dpo-beta0p1 and dpo-beta0p10 would be the same run"),
        (["--vary", "dpo.beta=0.1", "--vary", "dpo.beta=0.2"], "dpo.beta is given twice"),
        (["--vary", "sft.max_rows=1,2"], "changes what dpo continues: sweep it with --stage sft"),
        (["--vary", "compare.temperature=1,2"], "does not shape what dpo trains"),
        (["--vary", "reward.max_rows=1,2"], "does not shape what dpo trains"),
        (["--vary", "seed=" + ",".join(map(str, range(201)))], "at most 200"),
        (["--vary", "seed=1,2", "--name", "a/b"], "letters, digits and dashes"),
    ],
)
def test_what_cannot_be_varied_is_told(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        asked(*words)
    assert said in str(error.value)


def test_a_path_that_does_not_exist_ends_the_script_with_one_message(capfd: Any) -> None:
    text = mistake("sweep", "--recipe", "tiny", "--stage", "dpo", "--vary", "dpo.bta=1,2", light=True)
    assert text == "error: --vary dpo.bta: unknown key; did you mean 'beta'?"
