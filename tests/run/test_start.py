"""What a run continues: the stage before it as the recipe says, or what --from names, checked to fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import UserError
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.records.marks import AdapterMark
from toolkit.run import adapters, start
from toolkit.run.rundir import STARTED_FROM, WEIGHTS, RunDir
from toolkit.run.sealing import MARK, seal

RECIPE = load("tiny")
ROW = {"dtype": "F32", "shape": [16, 192], "data_offsets": [0, 4]}


def write_lora(folder: Path, recipe: Recipe = RECIPE, dtype: str = "F32", **config: Any) -> Path:
    """An adapter of the recipe as far as its config and the head of its weights go."""
    folder.mkdir(parents=True)
    lora = {"r": recipe.lora.r, "lora_alpha": recipe.lora.lora_alpha, "use_rslora": False}
    modules = {"target_modules": list(recipe.lora.target_modules)}
    base = {"peft_type": "LORA", "base_model_name_or_path": recipe.model.path}
    (folder / "adapter_config.json").write_text(json.dumps({**base, **lora, **modules, **config}))
    head = json.dumps({"base_model.model.layers.0.q_proj.lora_A.weight": ROW | {"dtype": dtype}}).encode()
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + b"four")
    return folder


def finish(run: RunDir, *overrides: str, held: dict[str, object] | None = None) -> RunDir:
    recipe = load("tiny", overrides)
    run.start(recipe.trajectory(run.stage))
    write_lora(run.adapter, recipe)
    trajectory = recipe.trajectory(run.stage)
    seal(run.adapter, MARK, AdapterMark(trajectory=trajectory, conditions=held, num_steps=1))
    run.record({"outcome": "finished"})
    return run


@pytest.fixture
def dpo(tmp_path: Path) -> RunDir:
    """The directory of a variant of DPO, in runs with two variants of SFT."""
    finish(RunDir(tmp_path, "tiny", "sft"))
    finish(RunDir(tmp_path, "tiny", "sft-long"), "sft.num_train_epochs=3")
    return RunDir(tmp_path, "tiny", "dpo-beta02")


def test_a_variant_continues_the_stage_before_it(dpo: RunDir) -> None:
    found = start.of(RECIPE, dpo)
    assert found and (found.name, found.folder) == ("sft", dpo.of("sft").adapter)
    assert found.check(RECIPE) == [] and found.trajectory(RECIPE) == RECIPE.trajectory("dpo")
    assert dpo.variants() == ["sft", "sft-long"] and dpo.stage == "dpo"


def test_what_was_named_is_recorded_with_its_own_values(dpo: RunDir) -> None:
    found = start.of(RECIPE, dpo, "sft-long")
    assert found and found.check(RECIPE) == []
    trajectory = found.trajectory(RECIPE)
    assert trajectory["sft.num_train_epochs"] == 3 and trajectory["from"] == "sft-long"
    assert trajectory["dpo.beta"] == 0.1
    assert start.of(RECIPE, dpo, "base") is None
    assert start.on_the_model_itself(RECIPE, "dpo").trajectory("dpo")["sft"] is None


def test_other_held_out_rows_of_sft_are_no_other_sft(dpo: RunDir) -> None:
    recipe = load("tiny", ("sft.eval_datasets.0.rows=24", "dpo.beta=0.3", "seed=1"))
    assert start.of(recipe, dpo).check(recipe) == []  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["sft.max_rows=5", "template.end_of_turn=x"])
def test_an_sft_of_other_values_is_refused_with_both_ways_out(dpo: RunDir, change: str) -> None:
    recipe = load("tiny", (change,))
    found = start.of(recipe, dpo)
    with pytest.raises(UserError, match=r"--name NAME.*--from sft-NAME.*Changed: " + change.split("=")[0]):
        assert found and found.check(recipe)


def test_another_lora_would_be_another_model_from_the_start(dpo: RunDir) -> None:
    recipe = load("tiny", ("lora.lora_alpha=16",))
    for named in (None, "sft-long"):
        found = start.of(recipe, dpo, named)
        with pytest.raises(UserError, match=r"lora.lora_alpha: 32 there, 16 in the recipe"):
            assert found and found.check(recipe)


def test_an_adapter_from_elsewhere_is_said_to_be_unsealed_and_not_fp32(dpo: RunDir, tmp_path: Path) -> None:
    mine = write_lora(tmp_path / "mine", dtype="BF16")
    found = start.of(RECIPE, dpo, str(mine))
    assert found and found.name == str(mine)
    unsealed, not_fp32 = found.check(RECIPE)
    assert "bears no seal" in unsealed and "are BF16" in not_fp32
    trajectory = found.trajectory(RECIPE)
    assert not [path for path in trajectory if path.startswith("sft")], "nobody knows what it was trained on"
    other = write_lora(tmp_path / "other", base_model_name_or_path="meta/Other-8B")
    with pytest.raises(UserError, match="was trained on meta/Other-8B"):
        start.of(RECIPE, dpo, str(other)).check(RECIPE)  # type: ignore[union-attr]


def test_a_name_under_which_there_is_nothing(dpo: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--from sft-lnog: no finished adapter .* there are sft, sft-long"):
        start.of(RECIPE, dpo, "sft-lnog")
    with pytest.raises(UserError, match=r"--from nowhere: .* no such folder as /"):
        start.of(RECIPE, dpo, "nowhere")


def test_a_truncated_adapter_is_damaged_with_a_seal_and_without(dpo: RunDir, tmp_path: Path) -> None:
    mine = write_lora(tmp_path / "mine")
    for folder in (mine, dpo.of("sft-long").adapter):
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[:-2])
        with pytest.raises(UserError, match="is damaged"):
            adapters.find(RECIPE, dpo, str(folder))
            adapters.check_fits(RECIPE, folder)


def test_a_variant_knows_what_it_continued_and_notices_another_in_its_place(dpo: RunDir) -> None:
    from toolkit.files import digest

    before = dpo.of("sft-long").adapter
    finish(dpo, "dpo.beta=0.2", held={f"sft-long{STARTED_FROM}": digest(before / WEIGHTS)})
    assert start.lineage(RECIPE, dpo) == ["sft-long", "dpo-beta02"]
    assert dpo.as_trained(RECIPE).section("dpo").beta == 0.2  # type: ignore[attr-defined]
    dpo.check_adapter()
    (before / WEIGHTS).write_bytes(b"other")
    with pytest.raises(UserError, match=r"another sft-long adapter.*run_dpo.py --recipe tiny --name beta02"):
        dpo.check_adapter()
