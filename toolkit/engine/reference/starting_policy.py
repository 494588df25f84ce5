"""The KL reference of learning from rewards: a copy of the adapter that the policy starts from, under its own name.

TRL makes it (grpo_trainer.py, rloo_trainer.py); Unsloth on a GPU deletes that of GRPO (unsloth/models/rl.py), and
the KL would be taken against the base model without a word. So it is put back where it is missing, proved, and held to
show no KL at all in the first step. No checkpoint holds it: a resumed run makes it anew from where the run began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.engine.base import token_rows
from toolkit.engine.base.random_state import RandomState
from toolkit.engine.reference.precompute import REF_ADAPTER
from toolkit.engine.reference.proof import POLICY_ADAPTER, prove_weights
from toolkit.errors import UserError

# Nats a token. Equal weights give equal bits on a CPU. On a GPU the two passes may take other kernels: not measured;
# the base model in place of the SFT policy of the tiny recipe gives 4.
MOST_KL = 0.0
MOST_KL_ON_GPU = 1e-3


def establish(model: Any, source: str) -> int:
    """Makes the copy where there is none, and proves it: returns how many weights are equal bit for bit.

    Raises UserError when it is not the policy, which was taken from `source`. Uses up no random numbers.
    """
    if REF_ADAPTER not in model.peft_config:
        generators = RandomState()
        model.add_adapter(REF_ADAPTER, model.peft_config[POLICY_ADAPTER])
        generators.restore()
    policy = dict(model.named_parameters())
    for name, parameter in policy.items():
        if f".{REF_ADAPTER}." in name:
            parameter.data = policy[name.replace(f".{REF_ADAPTER}.", f".{POLICY_ADAPTER}.")].detach().clone()
            parameter.requires_grad_(False)
    token_rows.copy(model, POLICY_ADAPTER, REF_ADAPTER)
    model.set_adapter(POLICY_ADAPTER)
    return prove_weights(model, source, "KL")


@contextlib.contextmanager
def left_out(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What is saved in the block has no copy: a resumed Trainer would load a folder of it, and the policy not at all.

    Gives the parameters without it, because PEFT saves whatever belongs to no adapter that it knows.
    """
    kept = model.peft_config.pop(REF_ADAPTER, None)
    try:
        yield {
            name: value for name, value in model.named_parameters() if f".{REF_ADAPTER}." not in f"{name}."
        }
    finally:
        if kept is not None:
            model.peft_config[REF_ADAPTER] = kept


class NoKlAtFirst(TrainerCallback):
    """Holds the first log, that of step 1, to a KL of 0; a run that is continued has none. `told` gets the number."""

    def __init__(self, told: dict[str, Any]):
        self._told = told

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step != 1 or "kl" not in logs:
            return
        most = MOST_KL_ON_GPU if torch.cuda.is_available() else MOST_KL
        self._told["kl_at_first"] = logs["kl"]
        if not abs(logs["kl"]) <= most:
            raise UserError(
                f"the first step shows a KL of {logs['kl']:.4g} nats a token to where the policy started (expected: 0"
                f"{f' within {most:g}' if most else ''}), before anything was trained: the reference is not that "
                "policy in the forward that trains. It is an error of ours or of the installed versions: report it "
                "with log.txt; --set rl.beta=0 trains without a reference"
            )
