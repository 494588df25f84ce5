"""What was found out about a model, its tokens and a set of rows, before a recipe says anything of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.data.accounting import Accounting


@dataclass(frozen=True)
class ModelFacts:
    """`path` is where the weights come from: what was asked for, or a 4-bit copy that Unsloth made of it.

    `base_16bit` is None where `path` has 16 bits itself, or where it is not known. `why` says for both how they were
    found. `linears` are those that the recipe's default would name, as this model has them.
    """

    path: str
    base_16bit: str | None
    is_quantised: bool
    architecture: dict[str, Any]
    linears: tuple[str, ...]
    why: str
    why_base: str


@dataclass(frozen=True)
class TemplateFacts:
    """The first template whose tokens the model knows, and the two tokens beside it; "" where nothing was found."""

    file: str
    end_of_turn: str
    pad_token: str
    has_system: bool
    why: str
    why_end: str
    why_pad: str


@dataclass(frozen=True)
class RowFacts:
    """The rows of one stage: their layout, what became of those that were read, and some prompts of them."""

    schema: str
    accounting: Accounting
    is_partial: bool
    prompts: tuple[str, ...]

    def counted(self) -> str:
        read = f"{'the first ' if self.is_partial else ''}{self.accounting.read:,}"
        return f"{self.accounting.used:,} of {read} rows are usable"
