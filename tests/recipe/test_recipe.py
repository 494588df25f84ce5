"""Recipes are read strictly, errors come together with their place, and no value is lost on its way."""

from pathlib import Path
from typing import Annotated

import pytest

from tests.conftest import ROOT
from toolkit.cards import CARDS
from toolkit.data import sets
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.recipe import stages
from toolkit.recipe.document import markdown
from toolkit.recipe.fields import Section, shapes_weights
from toolkit.recipe.load import RECIPES, load, names


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads_and_comes_back_from_its_own_yaml(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    copy = tmp_path / f"{name}.yaml"
    copy.write_text(recipe.to_yaml())
    assert load(str(copy)).model_dump() == recipe.model_dump()


def problems(*overrides: str, recipe: str = "tiny") -> str:
    with pytest.raises(UserError) as error:
        load(recipe, overrides)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dpo.beta", "expected dotted.path=value"),
        ("dpo.bta=0.2", "--set dpo.bta: unknown key; did you mean 'beta'?"),
        ("dop.beta=0.2", "did you mean 'dpo'?"),
        ("dpo.beta=-1", "--set dpo.beta: got -1: Input should be greater than 0"),
        ("dpo.beta='0.2'", "got '0.2': Input should be a valid number"),
        ("dpo.max_length=true", "got True: Input should be a valid integer"),
        ("sft.datasets.7.path=x", "sft.datasets is a list of 1"),
        ("sft.datasets=[", "not valid YAML"),
        ("sft.report_to=[tensorbord]", "'tensorboard' or 'wandb'"),
        ("sft.eval_rows=5", "--set sft.eval_rows: sft: eval_datasets and eval_rows are both set"),
        ("memory.per_device_train_batch_size=3", "--set memory.per_device_train_batch_size: sft.effective_b"),
        (
            "sft.datasets.0={pth: x}",
            "--set sft.datasets.0: sft.datasets.0.pth: unknown key; did you mean 'path'?",
        ),
        ("max_rows=5", "--set max_rows: unknown key; did you mean 'sft.max_rows' or 'dpo.max_rows' or"),
        ("sft.lr=1e-4", "--set sft.lr: unknown key; did you mean 'learning_rate'?"),
        ("lr=1e-4", "did you mean 'sft.learning_rate' or 'dpo.learning_rate' or"),
        ("sft.batch_size=4", "did you mean 'effective_batch_size'?"),
        ("sft.epochs=2", "did you mean 'num_train_epochs'?"),
        (
            "dpo.label_smoothing=0.1",
            "loss_type sigmoid has none: take loss_type robust, or label_smoothing 0",
        ),
        ("dpo.loss_type=aot", "got 'aot': Input should be 'sigmoid', 'robust'"),
        ("compare.measures.brief=(", "--set compare.measures.brief: got '(': not a regular expression"),
        ("compare.measures={a|b: x}", "compare.measures: got 'a|b': String should match pattern"),
        ("seed=4294967296", "less than 4294967296"),
        ("sft.num_train_epochs=.inf", "should be a finite number"),
        ("dpo.learning_rate=.inf", "should be a finite number"),
        ("model.architecture.num_hidden_layers=1000000000", "less than or equal to 1000"),
        ("sft.max_steps=1" + "0" * 400, "at most 2,147,483,647"),
        ("sft.learning_rate=1" + "0" * 400, "Input should be"),
        ("sft.max_steps=" + "9" * 5000, "the value is not valid YAML"),
        ("sft.max_steps=2021-13-40", "the value is not valid YAML"),
        ("sft=" + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("a=&p [*p]", "an alias of itself"),
        ("my-key=1", "--set my-key: unknown key"),
        ("1=1", "--set 1: unknown key"),
        ("\N{SNOWMAN}=1", "unknown key"),
        ("lora.lora-alpha=1", "unknown key; did you mean 'lora_alpha'?"),
        ("sft.datasets.\N{SUPERSCRIPT TWO}=x", "is none of its positions"),
        ("compare.prompts=[' ']", "compare.prompts.0"),
    ],
)
def test_a_wrong_override_says_what_is_allowed(override: str, said: str) -> None:
    assert said in problems(override)


def test_all_problems_are_reported_together_with_file_and_line(tmp_path: Path) -> None:
    text = load("tiny").to_yaml().replace("beta: 0.1", "betta: 0.1").replace("seed: 3407", "seed: many")
    text = text.replace("  pad_token:", "  # pad_token:").replace("  end_of_turn:", "  # end_of_turn:")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    lines = text.splitlines()
    said = problems(recipe=str(file))
    assert f"mine.yaml:{lines.index('seed: many') + 1}: seed: got 'many'" in said
    assert (
        f"mine.yaml:{lines.index('  betta: 0.1') + 1}: dpo.betta: unknown key; did you mean 'beta'?" in said
    )
    assert f"mine.yaml:{lines.index('template:') + 1}: template lacks end_of_turn, pad_token" in said


def test_a_regular_expression_that_does_not_compile_is_an_error_with_its_place(tmp_path: Path) -> None:
    lines = load("tiny", ("compare.measures={brief: x, listed: y}",)).to_yaml().splitlines()
    place = lines.index("    listed: y")
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join([*lines[:place], "    listed: '['", *lines[place + 1 :]]))
    said = f"mine.yaml:{place + 1}: compare.measures.listed: got '[': not a regular expression"
    assert said in problems(recipe=str(file))


def test_a_recipe_without_measures_of_its_own_has_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load("tiny", ("compare.measures={}",)).to_yaml().replace("  measures: {}\n", ""))
    assert load(str(file)).compare.measures == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "mine.yaml:1:"),
        ("a: 1\na: 2", "duplicate key"),
        ("- a", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "[" * 5000, "nested too deep"),
        (
            "a0: &a0 [x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
            "100,000 values",
        ),
        ("#" * 2**20 + "\n", "longer than 1,048,576 characters"),
        ("my-note: 1\n1: 2\n\N{SNOWMAN}: 3\n", "my-note: unknown key"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert said in problems(recipe=str(file))


def test_a_misspelt_name_shows_the_near_ones() -> None:
    assert "did you mean llama31_8b" in problems(recipe="lama31_8b")
    assert f"no recipe file {Path.cwd()}/nowhere/x.yaml" in problems(recipe="nowhere/x.yaml")
    assert "did you mean the shipped recipe, --recipe llama31_8b?" in problems(recipe="llama31_8b.yaml")


def test_a_fault_of_the_file_keeps_its_line_beside_one_of_an_override(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = load("tiny").to_yaml().replace("seed: 3407", "seed: many")
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(str(file), ("dpo.beta=x", "sft.max_rows=5"))
    of_file, of_override = sorted(error.value.problems, reverse=True)
    assert of_file.startswith(f"mine.yaml:{text.splitlines().index('seed: many') + 1}: seed: got 'many'")
    assert of_override.startswith("--set dpo.beta: got 'x'")


def test_one_tracker_is_a_list_of_it() -> None:
    assert load("tiny", ("sft.report_to=wandb",)).section("sft").report_to == ("wandb",)


def test_numbers_in_yaml_1_2() -> None:
    recipe = load("tiny", ("dpo.learning_rate=2e-4", "sft.num_train_epochs=1"))
    assert (
        recipe.dpo and recipe.dpo.learning_rate == 2e-4 and recipe.sft and recipe.sft.num_train_epochs == 1.0
    )


def test_paths_are_found_beside_the_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("tiny")
    assert Path(recipe.locate("tiny/sft.jsonl")).is_file()
    (tmp_path / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert recipe.locate("mine.jsonl") == str(tmp_path / "mine.jsonl")
    assert recipe.locate("owner/name") == "owner/name"


def test_the_trajectory_holds_what_shapes_the_weights_and_nothing_else() -> None:
    before = load("tiny").trajectory("dpo")
    for override in (
        "dpo.logging_steps=3",
        "sft.save_steps=7",
        "dpo.report_to=[tensorboard, wandb]",
        "compare.max_new_tokens=9",
        "description=x",
        "sft.max_dropped_fraction=0.3",
    ):
        assert load("tiny", (override,)).trajectory("dpo") == before
    for override in (
        "seed=1",
        "dpo.beta=0.3",
        "sft.learning_rate=0.1",
        "template.file=tokenizer",
        "lora.r=4",
    ):
        assert load("tiny", (override,)).trajectory("dpo") != before
    assert load("tiny", ("dpo.beta=0.3",)).trajectory("sft") == load("tiny").trajectory("sft")


# Roles and defaults ---------------------------------------------------------------------------------------------


def test_a_field_without_a_role_or_with_an_unexplained_default_does_not_load() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.beta has no role"):

        class Wrong(Section):
            beta: float

    with pytest.raises(TypeError, match=r"Unexplained\.beta has a default that is not explained"):

        class Unexplained(Section):
            beta: Annotated[float, shapes_weights("what it does")] = 0.1


# Beside these, which say something of few models and sets, a shipped recipe writes every key, or says that it is short.
SELDOM = {
    *("model.trust_remote_code", "model.architecture.head_dim", "model.architecture.tie_word_embeddings"),
    "model.architecture.max_position_embeddings",
    *("name", "data_dir", "split", "revision", "schema", "filter", "top_k", "rows", "weight"),
    # of one reward: what the others are, and a model's
    *("function", "model", "ends", "length", "contains", "matches", "json", "load_in_4bit", "architecture"),
    *("head_dim", "tie_word_embeddings"),
}


@pytest.mark.parametrize("name", names())
def test_a_shipped_recipe_writes_every_key(name: str) -> None:
    if "\n# Short: a key that is not here has the default" in (RECIPES / f"{name}.yaml").read_text():
        return
    unwritten = load(name).unwritten()
    inside_a_list = {path[-1] for path in unwritten if any(isinstance(part, int) for part in path)}
    others = {
        ".".join(map(str, path)) for path in unwritten if not any(isinstance(part, int) for part in path)
    }
    assert inside_a_list | others <= SELDOM


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of docs/recipe.md."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "short.yaml"
    file.write_text((ROOT / "docs/recipe.md").read_text().partition("```yaml\n")[2].partition("```")[0])
    return file


def test_a_recipe_of_25_lines_is_enough(short: Path) -> None:
    assert len(short.read_text().splitlines()) <= 25
    recipe = load(str(short))
    for stage in ("sft", "dpo"):
        assert (
            plan_stage(recipe, stage, CARDS["rtx4090"], 64).fits and plan_stage(recipe, stage, None, 16).fits
        )
        assert sets.problems(recipe, recipe.section(stage), stages.of(stage).row_kind) == []
    assert load(str(short), ("lora.r=8",)).lora.r == 8, "a section that is not written"
    assert "--set lora.rr: unknown key; did you mean 'r'?" in problems("lora.rr=8", recipe=str(short))
    assert "has no key 'loro'; did you mean 'lora'?" in problems("loro.r=8", recipe=str(short))


def test_what_was_not_written_is_spelled_out_and_marked(short: Path, tmp_path: Path) -> None:
    short.write_text(short.read_text().replace("sft.jsonl", "sft.jsonl\n      split: train"))
    recipe = load(str(short), ("dpo.beta=0.1", "lora.r=16"))
    lines = recipe.to_yaml().splitlines()
    for default in (
        "seed: 3407 # default",
        "  revision: null # default",
        "  lora_alpha: 16 # default",
        "  target_modules: # default",
        "  learning_rate: 0.0002 # default",
        "    top_k: null # default",
    ):
        assert default in lines
    for written in ("  r: 16", "  beta: 0.1", "    split: train", "    hidden_size: 192"):
        assert written in lines
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    again = load(str(copy))
    assert again.model_dump() == recipe.model_dump() and again.unwritten() == set()


def test_only_keys_without_a_default_are_asked_for(short: Path) -> None:
    short.write_text(
        short.read_text().replace("\n  file:", "\n  # file:").partition("\ndpo:")[0] + "\ndpo: {}\n"
    )
    said = problems(recipe=str(short))
    assert "template lacks file" in said and "dpo lacks datasets" in said and len(said.splitlines()) == 2


def test_the_document_is_that_of_the_schema() -> None:
    assert (ROOT / "docs/recipe.md").read_text() == markdown(), "`make docs` writes it again"


@pytest.mark.parametrize("name", ["...yaml", "..yaml"])
def test_a_recipe_file_that_would_name_a_folder_above_its_runs_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(load("tiny").to_yaml())
    assert "rename it" in problems(recipe=str(tmp_path / name))
