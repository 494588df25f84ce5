"""KTO on the tiny model: where it starts, whom a prompt is paired with, and that neither kills nor pieces change it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.engine.conftest import Stage, run_stage, stopped_in_the_fourth_step, tiny, weights
from toolkit.engine.base import model
from toolkit.engine.reference import proof as proving
from toolkit.engine.train import kto
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import RunDir
from toolkit.training.job import Job

FEW = (  # the epoch of 24 rows has 3 steps
    *("kto.max_steps=5", "kto.save_steps=2", "kto.learning_rate=1e-3"),
    *("kto.max_rows=32", "kto.eval_datasets=[]", "kto.eval_rows=8"),
)


def beside(sft: Path, folder: Path) -> Path:
    (folder / "tiny").mkdir()
    (folder / "tiny" / "sft").symlink_to(sft.resolve())
    return folder


@pytest.fixture(scope="module")
def done(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A few steps from the SFT adapter that nothing disturbed."""
    return run_stage(tiny(*FEW), "kto", beside(sft.run.path, tmp_path_factory.mktemp("kto")))


class Built(Exception):
    pass


@pytest.fixture(scope="module")
def trainer(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer before its reference pass."""

    def take(trainer: Any, *args: Any) -> None:
        raise Built(trainer)

    recipe, runs = tiny(*FEW), beside(sft.run.path, tmp_path_factory.mktemp("built"))
    job = Job(recipe, plan_stage(recipe, "kto", None, 16), RunDir(runs, "tiny", "kto"), Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built) as built:
        patch.setattr(proving, "establish", take)
        kto.run(job)
    trainer = built.value.args[0]
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_a_prompt_is_paired_with_the_reply_before_it_in_its_batch_as_trl_pairs_them() -> None:
    prompts = [[place] for place in range(11)]
    assert kto.neighbours(prompts, 4) == [3, 0, 1, 2, 7, 4, 5, 6, 10, 8, 9]
    assert kto.neighbours(prompts, 5) == [4, 0, 1, 2, 3, 9, 5, 6, 7, 8, 9], (
        "a single last row: the one before it"
    )
    assert kto.neighbours([[1], [1], [2], [2]], 4) == [3, 3, 1, 1], "never a true pair"
    assert kto.neighbours([[1], [1]], 2) == [1, 0], "where there is no other"


def test_it_starts_as_its_reference_and_its_loss_at_half_the_weights(done: Stage, sft: Stage) -> None:
    assert "the reference is the policy" in done.shown and "= half the mean weight of the rows" in done.shown
    first = done.report["reference"]["first_step"]
    labels = [row["label"] for row in trained_rows(done)[:8]]
    balance = done.report["class_balance"]
    mean = sum(balance["desirable_weight" if good else "undesirable_weight"] for good in labels) / 8
    assert first["expected_loss"] == pytest.approx(mean / 2) == pytest.approx(first["loss"], abs=0.01)
    assert abs(first["margin"]) < 0.02
    checkpoint = done.run.checkpoints / "checkpoint-4"
    assert not [path for path in checkpoint.rglob("*") if "ref" in path.name]
    assert not [name for name in load_file(checkpoint / "adapter_model.safetensors") if ".ref." in name]


def trained_rows(stage: Stage) -> list[dict[str, Any]]:
    from toolkit.engine.data import preparation
    from toolkit.engine.data.examples import load_tokenizer

    loaded, section = load_tokenizer(stage.recipe), stage.recipe.kto
    assert section
    prepared = preparation.prepare(stage.recipe, section, "labelled", loaded, Console(quiet=True))
    return list(kto.stage.in_order(prepared.train, section, stage.recipe.seed))


def test_its_report_says_what_it_learnt_and_how_the_classes_weigh(done: Stage) -> None:
    report = done.report
    assert report["loss_last"] < report["loss_first"]
    balance = report["class_balance"]
    assert balance["desirable"] + balance["undesirable"] == 24
    assert balance["desirable"] * balance["desirable_weight"] == pytest.approx(
        balance["undesirable"] * balance["undesirable_weight"]
    )
    assert f"{balance['desirable']} desirable rows with weight" in done.shown
    assert {"loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins"} <= report["eval"].keys()
    assert report["answers"]["after"] == "kto"
    page = done.run.page.read_text()
    assert "<h2>Classes</h2>" in page
    assert "KL term" in page and "undesirable" in page and "half the mean weight of the rows" in page


def test_weights_and_numbers_of_another_reference_are_noticed(trainer: Any) -> None:
    assert proving.prove_weights(trainer.model, "sft") > 0
    done = proving.precompute(trainer, 16, Console(quiet=True))
    proof = proving.prove(trainer, done)
    assert proof.holds and proof.margin == 0 and proof.loss == pytest.approx(proof.start, abs=1e-6)
    rows = trainer.train_dataset
    for column in trainer.reference_kind.columns:
        moved = rows.remove_columns(column).add_column(column, [value + 0.5 for value in rows[column]])
        trainer.train_dataset = moved
        assert not proving.prove(trainer, done).holds, column
    trainer.train_dataset = rows


def test_in_pieces_it_has_the_kl_of_the_whole_batch_and_the_same_gradient_and_log(trainer: Any) -> None:
    if not trainer.precompute_ref_logps:
        proving.precompute(trainer, 16, Console(quiet=True))
    rows = [trainer.train_dataset[index] for index in range(8)]
    for place, row in enumerate(
        rows
    ):  # as if the policy had moved away from it, from row to row by another measure
        row["ref_KL_logps"] -= place
    gradients, logs = [], []
    for split in (1, 4, 32):  # at once, in two pieces or so, a row at a time
        trainer.model.train()
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        trainer.recovery.split["train"] = split
        trainer.training_step(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
        assert trainer._whole_kl is None
        trained = model.trainable(trainer.model)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        logs.append(
            {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        )
    trainer.recovery.split["train"] = 1
    assert logs[0]["kl"] == pytest.approx(3.5, abs=0.2)
    for gradient, log in zip(gradients[1:], logs[1:], strict=True):
        assert ((gradient - gradients[0]).norm() / gradients[0].norm()).item() < 0.01
        assert log == pytest.approx(logs[0], abs=0.03)


@pytest.mark.long
def test_stopped_in_a_step_it_ends_with_the_same_bits(done: Stage, tmp_path: Path) -> None:
    beside(done.run.of("sft").path, tmp_path)
    with stopped_in_the_fourth_step():
        run_stage(tiny(*FEW), "kto", tmp_path)
    again = run_stage(tiny(*FEW), "kto", tmp_path)
    assert "continuing at step 2 of 5" in again.shown
    assert weights(again) == weights(done)
    assert again.report["train_tokens"] == done.report["train_tokens"]
    logged = [json.loads(line) for line in (done.run.metrics).read_text().splitlines()]
    resumed = [json.loads(line) for line in (again.run.metrics).read_text().splitlines()]
    assert [line.get("kl") for line in resumed] == [line.get("kl") for line in logged]
