"""Recipes are read strictly, errors come together with their place, and no value is lost on its way."""

from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load, names
from toolkit.recipe.schema import Recipe


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
        ("sft.eval_rows=5", "eval_datasets and eval_rows are both set"),
        ("memory.per_device_train_batch_size=3", "accumulation must be whole"),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "mine.yaml:1:"),
        ("a: 1\na: 2", "duplicate key"),
        ("- a", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert said in problems(recipe=str(file))


def test_a_misspelt_name_shows_the_near_ones() -> None:
    assert "did you mean llama31_8b" in problems(recipe="lama31_8b")
    assert "no recipe file nowhere/x.yaml" in problems(recipe="nowhere/x.yaml")


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


def leaves(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]
    return [path]


def test_every_leaf_of_a_recipe_is_read_somewhere() -> None:
    """A declared field that no code reads is a promise nobody keeps."""
    root = Path(__file__).resolve().parents[2]
    code = "\n".join(
        path.read_text() for path in (root / "toolkit").rglob("*.py") if path.name != "schema.py"
    )
    schema = (root / "toolkit" / "recipe" / "schema.py").read_text()
    recipe: Recipe = load("tiny", ("dpo.datasets.0.top_k={column: score, rows: 3}",))
    aliases = {"schema": "rows_schema"}
    for leaf in leaves(recipe.model_dump(mode="json", by_alias=True)):
        field = aliases.get(leaf.split(".")[-1], leaf.split(".")[-1])
        used = f".{field}" in code or f"self.{field}" in schema
        assert used or leaf.startswith("model.architecture."), f"{leaf} is read by nothing"
