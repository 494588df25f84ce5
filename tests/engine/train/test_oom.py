"""Out of memory: injected where it can happen, on the real path; the run ends as if it had not."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.engine.conftest import Stage, float32, run_stage, tiny
from toolkit.engine.base import oom, recompute
from toolkit.engine.reference import precompute
from toolkit.engine.train import dpo, pieces, sft
from toolkit.errors import UserError
from toolkit.run.rundir import EVENTS

THREE_STEPS = ("sft.max_rows=48", "memory.per_device_train_batch_size=8")
THREE_DPO_STEPS = (
    "dpo.max_rows=24",
    "memory.per_device_train_batch_size=4",
    "dpo.precompute_ref_batch_size=8",
)
BACKWARD_STOPS_AT = "layers.1.self_attn.q_proj.lora_B"  # the layers after it have their gradients by then


@dataclass
class Scarce:
    """Memory for so many rows (pairs) at once in training: beyond, a forward fails, or the middle of a backward."""

    rows: int
    where: str = "forward"
    mode: str = "train"
    from_step: int = 0
    always: Callable[[Any], bool] = lambda trainer: False
    failures: list[int] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch, trainer_class: Any) -> None:
        compute_loss = trainer_class.compute_loss
        scarce = self

        def limited(self, policy, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            fails = scarce.refuses(self, policy, inputs)
            if fails and scarce.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            loss = compute_loss(
                self, policy, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if fails:
                scarce.break_backward(policy)
            return loss

        monkeypatch.setattr(trainer_class, "compute_loss", limited)

    def refuses(self, trainer: Any, policy: Any, inputs: Any) -> bool:
        rows = len(inputs["input_ids"]) // (2 if "completion_mask" in inputs else 1)
        fails = (
            trainer.recovery.renamed is None  # the probe has its own tests
            and ("train" if torch.is_grad_enabled() else "eval") == self.mode
            and trainer.state.global_step >= self.from_step
            and (rows > self.rows or self.always(trainer))
        )
        if fails:
            self.failures.append(rows)
        return fails

    def break_backward(self, policy: Any) -> None:
        (weight,) = (
            w for name, w in policy.named_parameters() if BACKWARD_STOPS_AT in name and w.requires_grad
        )

        def stop(gradient: torch.Tensor) -> None:
            handle.remove()
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

        handle = weight.register_hook(stop)


def weights(stage: Stage) -> torch.Tensor:
    tensors = load_file(stage.run.adapter / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def assert_close(stage: Stage, undisturbed: Stage) -> None:
    """Within 1e-4 of the weights, and the same log: as many entries, the same steps, the same averages."""
    expected = weights(undisturbed)
    assert ((weights(stage) - expected).norm() / expected.norm()).item() < 1e-4
    for key in ("num_steps", "train_tokens"):
        assert stage.report[key] == undisturbed.report[key]
    for entry, other in zip(logged(stage), logged(undisturbed), strict=True):
        assert entry.keys() == other.keys()
        for key in entry:
            by_chance = key == "rewards/accuracies" and entry["step"] == 1  # the margins are 0
            if not (by_chance or key.endswith(("runtime", "per_second", "checkpoint_seconds"))):
                assert entry[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key


def logged(stage: Stage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stage.run.metrics.read_text().splitlines()]


def events(stage: Stage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage.run.path / EVENTS).read_text().splitlines()]


def adapter_bytes(stage: Stage) -> bytes:
    return (stage.run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def in_float32(sft: Stage) -> Iterator[None]:
    """The SFT run that all files share is made before, in bf16."""
    with float32():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return run_stage(tiny(*THREE_STEPS), "sft", tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("scarce", "pieces_of"),
    [
        pytest.param(Scarce(4), 4, id="forward of the first step"),
        pytest.param(Scarce(4, "backward"), 4, id="middle of the first backward"),
        pytest.param(Scarce(2, "backward", from_step=2), 2, id="twice in a row at the last step"),
    ],
)
def test_a_training_step_runs_again_in_pieces(
    scarce: Scarce, pieces_of: int, undisturbed: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce.install(monkeypatch, sft.SFTTrainer)
    stage = run_stage(tiny(*THREE_STEPS), "sft", tmp_path)
    assert_close(stage, undisturbed)
    told = events(stage)
    assert told == stage.report["oom_events"]
    assert len(told) == len(scarce.failures) == {4: 1, 2: 2}[pieces_of], "the factor is kept"
    last = told[-1]
    assert (last["step"], last["where"]) == (scarce.from_step + 1, "training")
    assert last["split_factor"] == 8 // pieces_of and f"pieces of {pieces_of}" in last["action"]
    assert {"allocated_gib", "reserved_gib", "free_gib"} <= last.keys()
    assert "out of memory (training, step" in stage.shown


@pytest.mark.campaign
def test_with_dropout_the_pieces_are_the_micro_batches_of_a_smaller_recipe_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = ("sft.max_rows=48", "lora.lora_dropout=0.1")
    smaller = run_stage(tiny(*dropout, "memory.per_device_train_batch_size=4"), "sft", tmp_path / "a")
    Scarce(4, "backward").install(monkeypatch, sft.SFTTrainer)
    split = run_stage(tiny(*dropout, "memory.per_device_train_batch_size=8"), "sft", tmp_path / "b")
    assert split.report["oom_events"]
    assert adapter_bytes(split) == adapter_bytes(smaller)
    losses = [[entry["loss"] for entry in logged(stage) if "loss" in entry] for stage in (split, smaller)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "summed in another order"


@pytest.mark.campaign
def test_a_single_row_recomputes_all_layers_for_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = ("sft.max_rows=16", "memory.per_device_train_batch_size=2", "memory.recompute_layers=1")
    expected = run_stage(tiny(*one_step), "sft", tmp_path / "a")
    Scarce(1, always=lambda trainer: recompute.num_recomputing(trainer.model) < 4).install(
        monkeypatch, sft.SFTTrainer
    )
    stage = run_stage(tiny(*one_step), "sft", tmp_path / "b")
    assert_close(stage, expected)
    assert "pieces of 1" in stage.report["oom_events"][0]["action"]
    assert all("4 of 4 layers recompute" in event["action"] for event in stage.report["oom_events"][1:])
    assert len(stage.report["oom_events"]) == 1 + 8, "each of the 8 micro-batches finds out anew"


def test_a_row_that_never_fits_is_named_and_the_run_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(0, from_step=2).install(monkeypatch, sft.SFTTrainer)
    with pytest.raises(
        UserError, match=r"training, step 3.* single row of \d+ tokens \(prepared row \d+\)"
    ) as error:
        run_stage(tiny(*THREE_STEPS), "sft", tmp_path)
    assert "lower max_length" in str(error.value)
    assert (tmp_path / "tiny/sft/checkpoints/checkpoint-2/trainer_state.json").is_file()
    assert not (tmp_path / "tiny/sft/adapter").exists()
    assert "stopping" in (tmp_path / "tiny/sft" / EVENTS).read_text().splitlines()[-1]


def test_evaluation_halves_its_batch(
    undisturbed: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(10, mode="eval").install(monkeypatch, sft.SFTTrainer)
    stage = run_stage(tiny(*THREE_STEPS), "sft", tmp_path)
    assert adapter_bytes(stage) == adapter_bytes(undisturbed)
    assert {event["where"] for event in stage.report["oom_events"]} == {"evaluation"}
    assert stage.report["oom_events"][-1]["split_factor"] == 4
    assert_close(stage, undisturbed)


@pytest.fixture(scope="module")
def undisturbed_dpo(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    runs = again(sft.run.root, tmp_path_factory.mktemp("undisturbed"))
    return run_stage(tiny(*THREE_DPO_STEPS), "dpo", runs)


def test_dpo_pairs_stay_together(
    runs_with_sft: Path, undisturbed_dpo: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(2, "backward").install(monkeypatch, dpo.DPOTrainer)
    stage = run_stage(tiny(*THREE_DPO_STEPS), "dpo", runs_with_sft)
    assert len(stage.report["oom_events"]) == 1
    assert_close(stage, undisturbed_dpo)


@pytest.mark.campaign
def test_the_reference_pass_and_evaluation_of_dpo_halve_their_batches(
    runs_with_sft: Path, undisturbed_dpo: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(5, mode="eval").install(monkeypatch, dpo.DPOTrainer)
    log_probs = precompute.log_probs_of
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs_with_sft / "cache"))  # no log-probs from before

    def limited(trainer: Any, batch: Any) -> Any:
        if len(batch["input_ids"]) > 2 * 3:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return log_probs(trainer, batch)

    monkeypatch.setattr(precompute, "log_probs_of", limited)
    stage = run_stage(tiny(*THREE_DPO_STEPS), "dpo", runs_with_sft)
    assert_close(stage, undisturbed_dpo)
    actions = [event["action"] for event in events(stage)]
    assert actions[:2] == ["goes on with 4 at once", "goes on with 2 at once"]
    assert {event["where"] for event in events(stage)} == {"reference pass", "evaluation"}


def again(runs: Path, folder: Path) -> Path:
    """Another runs directory with the same SFT run."""
    other = folder / "again"
    (other / "tiny").mkdir(parents=True)
    (other / "tiny/sft").symlink_to((runs / "tiny/sft").resolve())
    return other


def test_a_pair_that_never_fits_the_reference_pass_is_named() -> None:
    recovery = oom.Recovery(Path("/dev/null"), Console(quiet=True))

    def work(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match="pair 7 of 300 tokens alone"):
        recovery.halving("reference pass", 4, work, lambda: "pair 7 of 300 tokens")
    assert [event["split_factor"] for event in recovery.events] == [2, 4, 4]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert oom.is_out_of_memory(error) is expected


def test_any_other_error_passes_through() -> None:
    def work() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        oom.attempt(work)


def test_the_failed_attempt_holds_nothing() -> None:
    import weakref

    seen: list[Any] = []

    def work() -> None:
        activation = torch.zeros(8)
        seen.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory.\nand advice")

    assert oom.attempt(work) == oom.OutOfMemory("CUDA out of memory.")
    assert seen[0]() is None


def test_metrics_of_pieces_are_those_of_the_whole() -> None:
    log: dict[str, list[float]] = {"rewards/margins": [9.0], "num_tokens": [1.0]}
    logged = [
        {"rewards/margins": [1.0], "entropy": [2.0], "num_tokens": [50.0]},
        {"rewards/margins": [4.0], "entropy": [8.0], "num_tokens": [70.0]},
    ]
    log["entropy"] = []
    pieces.merge_metrics(log, logged, [{"": 2, "entropy": 1}, {"": 1, "entropy": 3}])
    assert log == {"rewards/margins": [9.0, 2.0], "entropy": [6.5], "num_tokens": [70.0]}
