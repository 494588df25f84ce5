"""Every loss that a recipe may name: where it starts, and that precomputed and in pieces it stays the same loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.engine.conftest import Stage, run_stage, tiny
from tests.engine.reference.test_proof import PAIRS, beside, cache, precompute, trainer  # noqa: F401
from toolkit.engine.base.micro_batches import MicroBatches
from toolkit.engine.reference import precompute as reference_pass
from toolkit.engine.reference import proof as proving
from toolkit.recipe.dpo_losses import LOSSES, DpoLoss

BETA = 0.3
ROWS = 2
PIECES = 0.01  # of a gradient's norm: bf16 rounds the matrices of one row otherwise than those of two


def test_the_proof_asks_of_every_loss_for_its_own_start(trainer: Any) -> None:  # noqa: F811
    done = precompute(trainer)
    assert set(get_args(DpoLoss)) == set(LOSSES)
    for name, known in LOSSES.items():
        with of_loss(trainer, name):
            proof = proving.prove(trainer, done)
        assert proof.holds and proof.margin == 0
        assert proof.loss == pytest.approx(known.start(BETA), rel=1e-6), name
    trainer.precompute_ref_logps = False


@pytest.mark.parametrize("name", LOSSES)
def test_precomputed_it_is_the_same_number_and_in_pieces_the_same_gradient(
    name: DpoLoss,
    trainer: Any,  # noqa: F811
    moved: None,
) -> None:
    rows = [dict(trainer.train_dataset[index]) for index in range(ROWS)]
    with reference_pass.use_adapter(trainer.model, "ref"):
        chosen, rejected = reference_pass.log_probs_of(trainer, batch(trainer, rows))
    with of_loss(trainer, name):
        in_step = loss(trainer, rows)
        for row, *values in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
            row.update(zip(trainer.reference_kind.columns, values, strict=True))
        trainer.precompute_ref_logps = True
        assert torch.equal(loss(trainer, rows), in_step)
        whole, in_pieces = (gradient(trainer, rows, pieces) for pieces in (1, 2))
        trainer.precompute_ref_logps = False
    assert ((in_pieces - whole).norm() / whole.norm()).item() < PIECES


@pytest.mark.long
def test_a_run_says_where_its_loss_starts(sft: Stage, tmp_path: Path) -> None:
    recipe = tiny(*PAIRS, "dpo.loss_type=ipo", "dpo.max_rows=8", "dpo.max_steps=1")
    done = run_stage(recipe, "dpo", beside(sft, tmp_path))
    assert "loss 25.000000 = 1 / (4 beta^2), largest margin 0.0e+00" in done.shown
    assert done.report["loss_first"] == pytest.approx(25, abs=0.3)


@contextmanager
def of_loss(trainer: Any, name: DpoLoss) -> Iterator[None]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loss_types", [name])
        patch.setattr(trainer, "beta", BETA)
        patch.setattr(trainer, "micro_batches", MicroBatches())  # cut by rows
        patch.setattr(trainer, "label_smoothing", 0.1 if LOSSES[name].has_label_smoothing else 0.0)
        yield


@pytest.fixture
def moved(trainer: Any) -> Iterator[None]:  # noqa: F811
    """The policy away from its reference, by small steps."""
    policy = [w for name, w in trainer.model.named_parameters() if "lora_B.default" in name]
    before, generator = [w.detach().clone() for w in policy], torch.Generator().manual_seed(1)
    for weight in policy:
        weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
    trainer.model.train()
    yield
    trainer.model.zero_grad()
    for weight, value in zip(policy, before, strict=True):
        weight.data = value


def batch(trainer: Any, rows: list[Any]) -> Any:  # noqa: F811
    return trainer._prepare_inputs(trainer.data_collator(rows))


def loss(trainer: Any, rows: list[Any]) -> torch.Tensor:  # noqa: F811
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch(trainer, rows))  # type: ignore[no-any-return]


def gradient(trainer: Any, rows: list[Any], pieces: int) -> torch.Tensor:  # noqa: F811
    trainer.model.zero_grad()
    trainer.recovery.split["train"] = pieces
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch(trainer, rows))
    trainer.recovery.split["train"] = 1
    return torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])
