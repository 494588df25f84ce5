"""The first step of DPO against what the proof promises: nothing has moved yet, so its margins are noise.

The proof compares equal batches, bit for bit. The steps batch the pairs otherwise, and in bf16 a log-prob also depends
on the batch that it was computed in: how far that goes is measured here, reported, and bounded.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from toolkit.errors import UserError
from toolkit.recipe.dpo_losses import LOSSES

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
        if state.global_step != 1 or "rewards/margins" not in logs or "loss" not in logs:
            return
        trainer = self._trainer
        loss, margin = logs["loss"], logs["rewards/margins"]
        if not math.isfinite(loss):
            return  # train/finite.py says which rows
        known, nats = LOSSES[trainer.loss_types[0]], LIMITS.get(str(trainer.model.dtype), LIMIT_HALF)
        start, limit, loss_limit = (
            known.start(trainer.beta),
            trainer.beta * nats,
            known.slope(trainer.beta) * nats,
        )
        trainer.reference["first_step"] = {"loss": loss, "margin": margin, "margin_limit": limit}
        if not (abs(margin) <= limit and abs(loss - start) <= loss_limit):
            raise UserError(
                f"the first DPO step shows a reward margin of {margin:.4f} and a loss of {loss:.4f} before anything "
                f"was trained (expected: 0 within {limit:g} and {known.formula} = {start:.4f} within {loss_limit:g}): "
                "the reference log-probs are not those of the policy in the forward that trains. Run it again with "
                "--fresh and with --set dpo.precompute_ref_batch_size equal to the plan's per_device_train_batch_size; "
                "if it stops again, it is an error of ours or of the installed versions: report it with log.txt"
            )
