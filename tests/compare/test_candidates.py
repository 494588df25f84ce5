"""Which models are compared: found, named shortly, and refused, all together, where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.compare.candidates import choose, reference
from toolkit.errors import UserError
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK, seal

RECIPE = load("tiny")


def adapter(folder: Path, base: str = "somewhere/base", **shapes: list[int]) -> Path:
    """A LoRA as far as its config and the head of its weights go."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = shapes or {"layers.0.self_attn.q_proj.lora_A": [4, 192]}
    header: dict[str, Any] = {
        f"base_model.model.model.{name}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A runs directory with both stages finished, and a checkpoint of the second."""
    run = RunDir(tmp_path / "runs", "tiny", "compare")
    for stage in ("sft", "dpo"):
        seal(adapter(run.of(stage).adapter), MARK)
    adapter(run.of("dpo").checkpoints / "checkpoint-8")
    return run


def problems(run: RunDir, names: str) -> list[str]:
    with pytest.raises(UserError) as error:
        choose(RECIPE, run, names)
    return list(error.value.problems)


def test_a_reward_model_is_not_compared(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "judge")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    with pytest.raises(UserError, match="holds a reward model: it gives scores"):
        choose(RECIPE, RunDir(tmp_path, "tiny", "compare"), str(folder))


def test_without_names_it_is_the_base_and_every_finished_stage(run: RunDir) -> None:
    assert list(choose(RECIPE, run, None)) == ["base", "sft", "dpo"]
    assert choose(RECIPE, run, "dpo, dpo") == {"dpo": run.of("dpo").adapter}


def test_a_stage_whose_seal_cannot_be_read_is_not_passed_over(run: RunDir) -> None:
    mark = run.of("dpo").adapter / MARK
    mark.write_bytes(b"\xff" + mark.read_bytes()[1:])
    for names in (None, "sft,dpo"):
        with pytest.raises(UserError, match=f"{run.of('dpo').adapter} is damaged: {MARK} cannot be read"):
            choose(RECIPE, run, names)


def test_paths_are_stages_checkpoints_and_adapters_under_short_names(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "v1.5", "tiny", "dpo")
    seal(adapter(other.adapter), MARK)
    mine = adapter(tmp_path / "my.lora_2")
    paths = [other.path, run.of("dpo").checkpoints / "checkpoint-8", mine]
    chosen = choose(RECIPE, run, ",".join(["dpo", *map(str, paths), "base"]))
    assert list(chosen) == ["dpo", "tiny-dpo", "checkpoint-8", "my-lora-2", "base"]
    assert chosen["tiny-dpo"] == other.adapter and chosen["base"] is None


def test_everything_wrong_is_said_at_once(run: RunDir, tmp_path: Path) -> None:
    elsewhere = adapter(tmp_path / "elsewhere", base="meta/Other-8B")
    wide = adapter(tmp_path / "wide", **{"layers.0.mlp.up_proj.lora_B": [999, 4]})
    deep = adapter(tmp_path / "deep", **{"layers.7.mlp.up_proj.lora_B": [384, 4]})
    pickled = adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    names = f"stf,{run.root},{elsewhere},{wide},{deep},{pickled},{tmp_path}/wid"
    said = problems(run, names)
    due = [
        "did you mean sft",
        "holds no adapter; there are",
        "was trained on meta/Other-8B, the base of recipe tiny is tiny/base",
        "up_proj has 999 features out, the base 384",
        "it has a layer 7, the base has 4 layers",
        "pickle files are not loaded",
        f"did you mean {tmp_path}/wide",
    ]
    assert len(said) == len(due) and all(part in problem for part, problem in zip(due, said, strict=True))


def test_any_rank_fits_and_a_quantised_copy_is_the_same_base(run: RunDir, tmp_path: Path) -> None:
    adapter(tmp_path / "a", base="unsloth/Base-bnb-4bit", **{"layers.3.mlp.down_proj.lora_A": [64, 384]})
    assert list(choose(RECIPE, run, f"{tmp_path}/a")) == ["a"]


def test_rewards_are_against_sft_or_else_the_base(run: RunDir, tmp_path: Path) -> None:
    found = reference(RECIPE, run)
    assert found and found.folder == run.of("sft").adapter
    found = reference(load("tiny", ("sft=null",)), run)
    assert found and found.folder is None
    assert reference(load("tiny", ("dpo=null", "kto=null")), run) is None
    assert reference(RECIPE, RunDir(tmp_path / "none", "tiny", "compare")) is None


def test_an_adapter_that_is_not_what_was_saved_is_refused_however_it_is_named(run: RunDir) -> None:
    with (run.of("dpo").adapter / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b" ")
    for names in (None, "dpo", f"base,{run.of('dpo').path}"):
        with pytest.raises(UserError, match=r"adapter_model.safetensors is not what was written"):
            choose(RECIPE, run, names)
