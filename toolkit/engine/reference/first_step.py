"""The first step of DPO or KTO against what the proof promises: nothing has moved yet, so its margins are noise.

The proof compares equal batches, bit for bit. The steps batch the rows otherwise, and in bf16 a log-prob also depends
on the batch that it was computed in: how far that goes is measured here, reported, and bounded.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from toolkit.errors import UserError

# Nats by which the mean margin of the step's pairs, without beta, may differ from 0. bf16 on the tiny recipe, on a CPU:
# up to 0.1 for a single pair (see reference/cache.py); a GPU was not measured, 0.2 to 0.5 a pair is what its two
# attention paths would give. The base in place of the SFT policy gives several nats.
LIMITS = {"torch.float32": 0.01}
LIMIT_HALF = 1.0


class FirstStep(TrainerCallback):
    """Looks at the first log, that of step 1; a run that is continued has none."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        trainer = self._trainer
        margin = trainer.reference_kind.logged(trainer, logs or {})
        if state.global_step != 1 or margin is None or "loss" not in logs:
            return
        if not math.isfinite(loss := logs["loss"]):
            return  # train/finite.py says which rows
        kind, rows = trainer.reference_kind, trainer.train_dataset
        num_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        start = kind.start(trainer, [rows[index] for index in range(min(num_rows, len(rows)))])
        nats = LIMITS.get(str(trainer.model.dtype), LIMIT_HALF)
        limit, loss_limit = trainer.beta * nats, start.slope * nats
        trainer.reference["first_step"] = {
            "loss": loss,
            "expected_loss": start.value,
            "formula": start.formula,
            "margin": margin,
            "margin_limit": limit,
        }
        if not (abs(margin) <= limit and abs(loss - start.value) <= loss_limit):
            raise UserError(
                f"the first step shows a reward margin of {margin:.4f} and a loss of {loss:.4f} before "
                f"anything was trained (expected: 0 within {limit:g} and {start.formula} = {start.value:.4f} within "
                f"{loss_limit:g}): the reference log-probs are not those of the policy in the forward that trains. Run "
                f"it again with --fresh and with --set {kind.name.lower()}.precompute_ref_batch_size equal to the "
                "plan's per_device_train_batch_size; if it stops again, it is an error of ours or of the installed "
                "versions: report it with log.txt"
            )
