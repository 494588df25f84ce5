"""What is tried against the baseline, one thing at a time. A new pair of settings to compare is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """A run with other settings of the recipe, or other variables of the environment, than the baseline of its stage
    or the variant that it is held `against`."""

    name: str
    stage: str
    settings: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    against: str | None = None


PADDED = ("dpo.share_prompts=false",)

VARIANTS = (
    Variant("padded pairs", "dpo", PADDED),
    # Padded batches alone are compiled; Unsloth notes some 100 s for it at the start.
    Variant("compiled layers", "dpo", (*PADDED, "memory.compile=true"), against="padded pairs"),
    # Setting this variable takes Unsloth's older cross entropy (unsloth_zoo fused_losses/cross_entropy_loss.py).
    Variant("older cross entropy", "sft", variables={"UNSLOTH_CE_LOSS_TARGET_GB": "0.5"}),
    Variant("logits 0.125 GiB at a time", "dpo", ("memory.loss_chunk_gib=0.125",)),
    Variant("logits 2 GiB at a time", "dpo", ("memory.loss_chunk_gib=2.0",)),
    Variant("segments that do not expand", "dpo", ("memory.alloc_conf=expandable_segments:False",)),
    Variant(
        "blocks not split above 128 MiB",
        "dpo",
        ("memory.alloc_conf=expandable_segments:True,max_split_size_mb:128",),
    ),
)
