"""The reference of DPO and KTO: its log-probs computed once before training, and the proof that it is the policy.

TRL copies the adapter that the policy starts from into one called "ref". We read its log-probs for every row, or
find them where an earlier pass left them, attach them to the rows, prove them and delete the copy: training then
holds one adapter, a checkpoint too.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from toolkit.engine.base.random_state import RandomState
from toolkit.engine.reference import cache
from toolkit.engine.reference.kinds import Start
from toolkit.engine.reference.precompute import (
    REF_ADAPTER,
    Pass,
    batch_of,
    forward_of,
    log_probs_of,
    precompute,
)
from toolkit.errors import UserError
from toolkit.run import manifest

POLICY_ADAPTER = "default"
# The margins of the same batch were exactly 0 in 164 passes over 160 pairs in 18 processes, with one thread or two, on
# idle and on busy cores. Another batch size alone moves a pair by up to 0.1 nats.
MARGIN_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-3  # of the value that the loss starts with where that is above 1


@dataclass(frozen=True)
class Proof:
    """The policy on some rows against their reference: the loss farthest from `start`, where it has to begin, and the
    largest reward margin (of KTO: reward). `formula` says in words what the start is."""

    rows: int
    loss: float
    margin: float
    start: float
    formula: str

    @property
    def loss_tolerance(self) -> float:
        return LOSS_TOLERANCE * max(1.0, self.start)

    @property
    def holds(self) -> bool:
        return self.margin <= MARGIN_TOLERANCE and abs(self.loss - self.start) <= self.loss_tolerance


def establish(trainer: Any, source: str, batch_size: int, console: Console) -> dict[str, Any]:
    """Attaches the reference log-probs to the trainer's rows, proves that they are the policy's, drops the adapter.

    Proved are the weights, bit for bit, and then the numbers: batches of the pass go through the policy as they
    went through the reference. Numbers of equal weights that differ are computed once more, and not taken from
    disk. Returns the report's {pairs, reused, seconds}. Raises UserError when the reference is not the policy;
    `source` is the adapter that both were taken from. Uses up no random numbers.
    """
    started, generators, kind = time.perf_counter(), RandomState(), trainer.reference_kind
    num_weights = prove_weights(trainer.model, source, kind.name)
    done = precompute(trainer, batch_size, console)
    proof = _worst(trainer, prove(trainer, done))
    if not proof.holds:
        where = "found on disk" if done.reused else "computed"
        console.print(
            f"[yellow]the reference log-probs {where} are not those of the policy (largest margin {proof.margin:.4f}), "
            "although their weights are equal: all are computed again[/]"
        )
        done = precompute(trainer, batch_size, console, anew=True)
        proof = _worst(trainer, prove(trainer, done))
    if not proof.holds:
        cache.delete(done.keys)
        raise UserError(
            f"the {kind.name} reference is not the policy that training starts from: on {proof.rows} {kind.called} the "
            f"loss is {proof.loss:.4f} (expected: {proof.formula} = {proof.start:.4f} within "
            f"{proof.loss_tolerance:g}) and the largest margin {proof.margin:.4f} (expected: 0 within "
            f"{MARGIN_TOLERANCE:g}), twice. Their weights are equal, taken from {source}: passes over the same batch "
            f"do not give the same numbers here. {_fix()}, and check the machine"
        )
    drop(trainer)
    generators.restore()
    console.print(
        f"[green]the reference is the policy[/] ({source}): {num_weights} weights equal bit for bit, loss "
        f"{proof.loss:.6f} = {proof.formula}, largest margin {proof.margin:.1e} on {proof.rows} {kind.called}"
    )
    [reused] = trainer.processes.sum(done.reused)
    return {"pairs": done.pairs, "reused": int(reused), "seconds": time.perf_counter() - started}


def _worst(trainer: Any, own: Proof) -> Proof:
    """Of several processes the first proof that does not hold: what follows from it, all of them do."""
    proofs = [Proof(**found) for found in trainer.processes.gather(asdict(own))]
    return next((proof for proof in proofs if not proof.holds), own)


def prove_weights(model: Any, source: str, of: str = "DPO") -> int:
    """How many tensors of the policy's adapter there are, all equal to the reference's bit for bit, or UserError."""
    reference = dict(_adapter(model, REF_ADAPTER))
    policy = dict(_adapter(model, POLICY_ADAPTER))
    apart = sorted(
        name
        for name in policy.keys() | reference.keys()
        if not (name in policy and name in reference and _same_bits(policy[name], reference[name]))
    )
    if apart or not policy:
        raise UserError(
            f"the {of} reference is not the policy that training starts from: "
            f"{len(apart)} of {len(policy)} weights of the copy that TRL made of {source} differ"
            f"{f', the first is {apart[0]}' if apart else ''}. {_fix()}"
        )
    return len(policy)


def prove(trainer: Any, done: Pass) -> Proof:
    """Runs the first and the last batch of the pass through the policy, batched and padded as the pass had them.

    In another batch, or beside longer pairs, the same pair comes out up to 0.1 nats apart in bf16; in the same batch
    equal weights give equal bits. Nothing of it reaches the logs.
    """
    margins, losses, starts = [], [], list[Start]()
    kind = trainer.reference_kind
    logged, tokens = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = {mode: defaultdict(list) for mode in logged}
    try:
        for indices in done.ends:
            rows = [trainer.train_dataset[index] for index in indices]
            batch = batch_of(trainer, rows)
            starts.append(kind.start(trainer, rows))
            with forward_of(trainer.model, training=True):
                log_probs = zip(log_probs_of(trainer, batch), kind.columns, strict=True)
                margins.append(kind.apart(*(policy - batch[column] for policy, column in log_probs)))
                # As `train()` will run it: accelerate wraps the model's forward in this autocast, here nothing has.
                with torch.no_grad(), trainer.accelerator.autocast():
                    losses.append(trainer.compute_loss(trainer.model, batch))
    finally:
        trainer._metrics, trainer._total_train_tokens = logged, tokens
    loss = torch.stack(losses)
    begins = loss.new_tensor([start.value for start in starts])
    worst = int((loss - begins).abs().argmax())  # NaN counts as the largest, in both
    margin = trainer.beta * torch.cat(margins).abs().max().item()
    return Proof(
        sum(map(len, done.ends)), loss[worst].item(), margin, starts[worst].value, starts[worst].formula
    )


def drop(trainer: Any) -> None:
    """Deletes the reference adapter, whose log-probs the rows carry now."""
    trainer.model.delete_adapter(REF_ADAPTER)


def _adapter(model: Any, adapter: str) -> Any:
    """(name without the adapter's, tensor) of its weights."""
    return (
        (f"{name}.".replace(f".{adapter}.", "."), parameter)
        for name, parameter in model.named_parameters()
        if f".{adapter}." in f"{name}."
    )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.detach().flatten().view(torch.uint8) for tensor in (one, other)))


def _fix() -> str:
    versions = manifest.packages()
    named = ", ".join(f"{name} {versions[name]}" for name in ("trl", "peft", "unsloth"))
    return f"Install the versions that requirements.txt and requirements-unsloth.txt name (here: {named})"
