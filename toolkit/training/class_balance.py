"""How many good and bad replies a set for KTO holds, and the weights of their losses that follow."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import UserError
from toolkit.recipe.schema import Kto

# Ethayarajh et al. 2024, equation 8 as TRL reads it (kto_trainer.py): weight times number of the good over the bad ones
LOWEST, HIGHEST = 1.0, 4 / 3


@dataclass(frozen=True)
class ClassBalance:
    """Rows of each class, and what the loss of one of them is multiplied by."""

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float

    @classmethod
    def of(cls, section: Kto, desirable: int, undesirable: int) -> ClassBalance:
        """With `auto` worked out so that both classes count the same; where both are, the rarer one is raised.

        Raises UserError where a class has no row and its weight is to follow from their number.
        """
        good, bad = section.desirable_weight, section.undesirable_weight
        if not (desirable and undesirable) and "auto" in (good, bad):
            raise UserError(
                f"all {desirable + undesirable:,} rows are {'desirable' if desirable else 'undesirable'}, so no weight "
                "of the classes follows: KTO learns from both. Look at the label column; or train on one class all the "
                "same with --set kto.desirable_weight=1 --set kto.undesirable_weight=1"
            )
        if good == "auto" and bad == "auto":
            rarer = min(desirable, undesirable)
            good, bad = undesirable / rarer, desirable / rarer
        elif good == "auto":
            assert bad != "auto"
            good = bad * undesirable / desirable
        elif bad == "auto":
            bad = good * desirable / undesirable
        return cls(desirable, undesirable, good, bad)

    @property
    def ratio(self) -> float | None:
        """Of the weight of all good replies to that of all bad ones; None where there is no bad one."""
        bad = self.undesirable * self.undesirable_weight
        return self.desirable * self.desirable_weight / bad if bad else None

    def told(self) -> str:
        return (
            f"{self.desirable:,} desirable rows with weight {self.desirable_weight:.4g}, {self.undesirable:,} "
            f"undesirable ones with weight {self.undesirable_weight:.4g}"
        )

    def warning(self) -> str | None:
        """That the weights leave the range that the paper found good, with those that would not; None within it."""
        if self.ratio is None or LOWEST - 1e-6 <= self.ratio <= HIGHEST + 1e-6:
            return None
        return (
            f"together the desirable rows weigh {self.ratio:.2f} times the undesirable ones; from {LOWEST:g} to "
            f"{HIGHEST:.2f} is advised: --set kto.desirable_weight=auto --set kto.undesirable_weight=auto"
        )
