"""Rows of embedding and head that are trained with the LoRA: begun, continued, copied for the reference, exported."""

import argparse
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.engine.base.test_tokens import BASE, EMBEDDING, END, HEAD, RESERVED
from tests.engine.conftest import run_stage, tiny, weights
from toolkit import hardware, process
from toolkit.engine.base import model, token_rows
from toolkit.engine.export import export, merge
from toolkit.engine.reference import proof
from toolkit.engine.train.pieces import OutOfMemoryRecovery
from toolkit.errors import Interrupted, UserError
from toolkit.export import artefact
from toolkit.memory.plan import Settings
from toolkit.recipe.schema import Recipe

TRAINED = "lora.trainable_tokens=[<|eot_id|>]"
FEW = ("sft.max_steps=4", "dpo.max_steps=2", "dpo.max_rows=8", "dpo.eval_datasets=[]", "sft.eval_datasets=[]")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny base as if pre-training had never seen <|eot_id|>: its rows are zero, and so are others of the head."""
    folder = tmp_path_factory.mktemp("unknown") / "base"
    shutil.copytree(BASE, folder)
    stored = load_file(folder / "model.safetensors")
    stored[EMBEDDING][END] = stored[HEAD][END] = 0
    stored[HEAD][RESERVED] = 0
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return f"model.path={folder}"


def rows_of(adapter: Path) -> dict[str, torch.Tensor]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return {name: tensor for name, tensor in stored.items() if token_rows.ROWS in name}


def loaded(recipe: Recipe) -> model.LoadedModel:
    made = model.load(recipe, 64)
    model.attach_lora(made, recipe, Settings(1, 1, 0, 0.5), 64)
    return made


def test_rows_that_the_base_lacks_begin_at_the_mean_and_train_in_float32(unknown: str) -> None:
    made = loaded(tiny(unknown, TRAINED))
    trained = {n: p for n, p in made.model.named_parameters() if token_rows.ROWS in n}
    assert len(trained) == 2
    assert {(p.dtype, p.requires_grad, p.shape[0]) for p in trained.values()} == {(torch.float32, True, 1)}
    for matrix in (made.model.get_input_embeddings(), made.model.get_output_embeddings()):
        mean = matrix.token_adapter.get_base_layer().weight.float().mean(0)
        assert torch.allclose(matrix.weight[END].float(), mean, atol=1e-3)


def test_rows_that_the_base_knows_begin_as_they_are() -> None:
    made = loaded(tiny(TRAINED))
    for matrix in (made.model.get_input_embeddings(), made.model.get_output_embeddings()):
        assert torch.equal(matrix.weight[END], matrix.token_adapter.get_base_layer().weight[END])


def test_where_embedding_and_head_are_one_matrix_the_row_is_one(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((BASE / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    stored = load_file(BASE / "model.safetensors")
    del stored[HEAD]
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny(f"model.path={tmp_path / 'base'}", "model.architecture.tie_word_embeddings=true", TRAINED)
    made = loaded(recipe)
    [(_, row)] = [(n, p) for n, p in made.model.named_parameters() if token_rows.ROWS in n]
    row.data.fill_(0.5)
    for matrix in (made.model.get_input_embeddings(), made.model.get_output_embeddings()):
        assert set(matrix.weight[END].tolist()) == {0.5}
    made.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lora = merge.read_lora(tmp_path / "adapter")
    assert lora.rows.keys() == {EMBEDDING}
    assert set(lora.merged(EMBEDDING, stored[EMBEDDING])[END].tolist()) == {0.5}
    assert torch.equal(lora.merged(EMBEDDING, stored[EMBEDDING])[:END], stored[EMBEDDING][:END])
    merge.check_base(tmp_path / "base", "base", lora)


def test_the_reference_has_the_policys_rows_and_a_copy_without_them_is_noticed() -> None:
    made = loaded(tiny(TRAINED))
    made.model.add_adapter("ref", made.model.peft_config["default"])
    for name, parameter in list(made.model.named_parameters()):  # as TRL copies
        if ".default." in name:
            made.model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        elif name.endswith(f"{token_rows.ROWS}.default"):
            parameter.data.add_(1.0)  # what SFT made of them
    with pytest.raises(UserError, match=r"2 of 58 weights of the copy .* differ"):
        proof.prove_weights(made.model, "sft")
    token_rows.copy(made.model, "default", "ref")
    assert proof.prove_weights(made.model, "sft") == 58


@pytest.mark.long
def test_stopped_and_continued_the_rows_are_the_same_bits_and_dpo_goes_on_from_them(
    unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(unknown, TRAINED, *FEW)
    undisturbed = run_stage(recipe, "sft", tmp_path / "whole")
    step, calls = OutOfMemoryRecovery.training_step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 + 2:  # the probe's is the first
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OutOfMemoryRecovery, "training_step", counted)
        with pytest.raises(Interrupted):
            run_stage(recipe, "sft", tmp_path)
    again = run_stage(recipe, "sft", tmp_path)
    assert weights(again) == weights(undisturbed)
    aligned = run_stage(recipe, "dpo", tmp_path)  # its proof holds the reference's rows against the policy's
    before, after = rows_of(again.run.adapter), rows_of(aligned.run.adapter)
    assert len(before) == 2 and not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.campaign
def test_a_model_learns_to_end_with_a_token_that_its_base_never_saw(unknown: str, tmp_path: Path) -> None:
    """Trained, answers end in a token whose rows were zero; merged and as an adapter they do so elsewhere too."""
    more = ("compare.max_new_tokens=40", "sft.max_rows=null", "sft.max_steps=100", "sft.num_train_epochs=2")
    recipe = tiny(unknown, TRAINED, *more)
    done = run_stage(recipe, "sft", tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    artefact.add_options(parser)
    for kind in ("adapter", "merged_16bit"):
        words = ["--runs", str(tmp_path), "--stage", "sft", "--format", kind, "--out", str(tmp_path / kind)]
        measured = export.run(
            artefact.wanted(recipe, parser.parse_args(words)), Console(quiet=True)
        )  # also stops unless what the trained model ends, the export ends
        assert measured is not None and measured.passed
    merged = load_file(tmp_path / "merged_16bit" / "model.safetensors")
    assert merged[HEAD][END].norm() > 0 and merged[EMBEDDING][END].norm() > 0
    after = [row["after"] for row in answers(done.run.path)]
    assert all(answer["ended"] for answer in after)


def answers(folder: Path) -> list[Any]:
    from toolkit.records.record import read_lines

    return list(read_lines(folder / "answers.jsonl"))


def test_a_token_that_the_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.trainable_tokens: '<\|none\|>' not in the vocabulary"):
        model.load(tiny("lora.trainable_tokens=[<|none|>]"), 64)


def test_on_a_gpu_where_unsloth_freezes_the_rows_the_recipe_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = hardware.Gpu("NVIDIA GeForce RTX 4090", 23.5, 23.0, (8, 9), "580.1", (13, 0))
    machine = replace(hardware.here(), gpu=card, no_gpu=None)
    monkeypatch.setattr(hardware, "torch_build", lambda: ("2.13.0", "13.0"))
    with pytest.raises(
        UserError, match=r"lora\.trainable_tokens names <\|eot_id\|>: on a GPU Unsloth freezes"
    ):
        process.prepare(tiny(TRAINED), machine, Console(quiet=True))
