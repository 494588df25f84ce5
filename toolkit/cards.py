"""Named cards to plan for, and how people write their names."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from toolkit.errors import UserError


@dataclass(frozen=True)
class Card:
    """A GPU as the plan needs it. `total_gib` is what torch sees of it, some 2% less than its label, `label_gb`.

    `bf16_tflops` is the dense bf16 rate with fp32 accumulation, `bandwidth_gb_s` that of its memory, `sm` its
    compute capability; None where unknown. The two rates only serve floors of time, so the fastest variant of
    a card stands for all.
    """

    name: str
    total_gib: float
    bf16_tflops: float | None = None
    bandwidth_gb_s: float | None = None
    sm: tuple[int, int] | None = None
    label_gb: int | None = None


# Rates: NVIDIA data sheets, without sparsity (GeForce: GA102, Ada and Blackwell white papers, fp32 accumulation; 4090
# and H200: its data sheet). Memory: the least that Unsloth's banner or torch's out-of-memory messages show
# for the card in public logs; newer drivers leave a little less than older ones.
CARDS: dict[str, Card] = {
    # GA102 white paper: 71 and 936; seen 23.68, lowered to the 4090's for newer drivers
    "rtx3090": Card("NVIDIA GeForce RTX 3090", 23.5, 71, 936, (8, 6), 24),
    # Ada white paper: 165.2 and 1008; seen 23.51 to 23.65
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 23.5, 165.2, 1008, (8, 9), 24),
    # Blackwell white paper: 209.5 and 1792; seen 31.36 and 31.37
    "rtx5090": Card("NVIDIA GeForce RTX 5090", 31.3, 209.5, 1792, (12, 0), 32),
    # A5000 data sheet: 222.2 with sparsity, so 111.1, and 768; not seen, so as the L4 with its ECC
    "a5000": Card("NVIDIA RTX A5000", 22.0, 111.1, 768, (8, 6), 24),
    # A6000 data sheet: 309.7 with sparsity, so 154.8, and 768; seen 44.43 (ECC on) to 47.54
    "a6000": Card("NVIDIA RTX A6000", 44.4, 154.8, 768, (8, 6), 48),
    # 6000 Ada data sheet: 1457 in fp8 with sparsity, so 364.2, and 960; not seen, so as the L40S with its ECC
    "rtx6000_ada": Card("NVIDIA RTX 6000 Ada Generation", 44.3, 364.2, 960, (8, 9), 48),
    # L4 data sheet: 242 with sparsity, so 121, and 300; seen 22.03 to 22.16 (ECC on)
    "l4": Card("NVIDIA L4", 22.0, 121, 300, (8, 9), 24),
    # L40S data sheet: 362.05 and 864; seen 44.39 to 44.52 (ECC on)
    "l40s": Card("NVIDIA L40S", 44.3, 362, 864, (8, 9), 48),
    # A40 data sheet: 149.7 and 696; seen 44.34 to 44.55 (ECC on)
    "a40": Card("NVIDIA A40", 44.3, 149.7, 696, (8, 6), 48),
    # A100 data sheet: 312 and 1555; seen 39.38 to 39.56
    "a100_40": Card("NVIDIA A100 40GB", 39.3, 312, 1555, (8, 0), 40),
    # A100 data sheet: 312 and 2039 (SXM); seen 79.14 to 79.25
    "a100_80": Card("NVIDIA A100 80GB", 79.1, 312, 2039, (8, 0), 80),
    # H100 data sheet, SXM: 1979 with sparsity, so 989, and 3350; seen 79.18
    "h100": Card("NVIDIA H100 80GB", 79.1, 989, 3350, (9, 0), 80),
    # H200 data sheet: 989 and 4.8 TB/s; seen 139.72 to 139.81
    "h200": Card("NVIDIA H200", 139.7, 989, 4800, (9, 0), 141),
    # HGX B200 data sheet: 36 PFLOPS of eight with sparsity, so 2250, and 8 TB/s; seen 178.35
    "b200": Card("NVIDIA B200", 178.3, 2250, 8000, (10, 0), 180),
}
MOST_GIB = 192  # a bare number above is no card's memory
# What makers, hosts and drivers write around a model's name.
_AROUND = re.compile(r"nvidia|geforce|tesla|quadro|rtx|generation|sxm\d*|pcie|hbm\d*e?|[^a-z0-9]")


def known_card(text: str) -> Card | None:
    """The card of CARDS that is meant, in any usual spelling: "4090", "RTX 4090", "NVIDIA A100-SXM4-80GB"."""
    wanted = _AROUND.sub("", text.lower())
    for key, found in CARDS.items():
        model, _, size = key.removeprefix("rtx").partition("_")
        sizes = [f"{found.label_gb}{unit}" for unit in ("", "gb", "gib", "g")]
        if size == str(found.label_gb):  # there is another of the same name
            names = [f"{model}{one}" for one in sizes]
        else:
            names = [f"{model}{size}{one}" for one in ("", *sizes)]
        if wanted in names:
            return found
    return None


def card(text: str) -> Card:
    """The card that `--gpu` names, or one of so many GiB ("24", "200 GiB"). Raises UserError."""
    if found := known_card(text):
        return found
    if number := re.fullmatch(r"(-?\d+(?:\.\d*)?|nan|inf)(gib|gb)?", text.lower().replace(" ", "")):
        gib = float(number[1])
        if not (math.isfinite(gib) and gib > 0):
            raise UserError(f"a card with {text} GiB: the memory must be above 0, for example 24")
        if number[2] or gib <= MOST_GIB:
            return Card(f"{gib:g} GiB card", gib)
    wanted = _AROUND.sub("", text.lower())
    near = [key for key in CARDS if wanted and wanted in key]
    near = near or difflib.get_close_matches(text.strip().lower(), CARDS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"no card {text!r}: {hint}Known cards: {', '.join(CARDS)}; or the card's memory, for example 24 or 24GiB"
    )
