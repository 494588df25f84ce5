"""The table of stages: whatever tells one training stage from another, in the order in which they run.

To add a stage: a row here, a section of the recipe (stage_sections.py), its trainer's arguments
(training/trainer_args.py), one file that builds its trainer (engine/train/), a script. What the row names (charts,
memory phases) is defined where it belongs; a test holds the names together. A stage may be trained several times
side by side, under names of their own: its variants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

RowKind = Literal["chat", "pair", "labelled", "prompt"]
Task = Literal["causal_lm", "seq_cls"]  # PEFT's names: to answer, or to give a conversation one score
# At step 1 the policy is still its reference, and every pair a tie: what tells them apart is noise.
FIRST_STEP_APART = 2


@dataclass(frozen=True)
class PanelField:
    """A number that the live panel shows: its name in the Trainer's logs, label, format, and whether as a curve too.

    Before `first_step` it says nothing.
    """

    key: str
    label: str
    style: str
    has_curve: bool = False
    first_step: int = 0


@dataclass(frozen=True)
class Stage:
    """One training stage.

    `name` is its section in the recipe, its directory in runs/ and the ending of its script; `title` heads its report,
    `label` its column in tables. `sequences_per_row` go through the model for one row: a pair is two. It starts from
    the adapter of the first of `continues` that the recipe has, else from the model itself; with `has_reference` its
    loss is measured against where it started. `charts` are names of report/curves.py, `memory_phases` of
    memory/phases.py. `report_extras` are attributes of its trainer that report.json takes up. `task` is what its model
    does. `across_processes`: whether several processes can train it together. A row of prompts is a batch's
    `num_generations` completions: there a sequence is one of them.
    """

    name: str
    title: str
    label: str
    row_kind: RowKind
    sequences_per_row: int
    continues: tuple[str, ...]
    has_reference: bool
    charts: tuple[str, ...]
    panel_fields: tuple[PanelField, ...]
    memory_phases: tuple[str, ...]
    report_extras: tuple[str, ...] = ()
    task: Task = "causal_lm"
    across_processes: bool = True

    @property
    def answers(self) -> bool:
        """Whether its model can be asked; one that gives scores cannot."""
        return self.task == "causal_lm"

    @property
    def rows_are_called(self) -> str:
        """What a batch is made of."""
        return {"chat": "rows", "pair": "pairs", "labelled": "rows", "prompt": "completions"}[self.row_kind]


LOSS = PanelField("loss", "loss", "{:.4f}", has_curve=True)

SFT = Stage(
    name="sft",
    title="Supervised fine-tuning",
    label="SFT",
    row_kind="chat",
    sequences_per_row=1,
    continues=(),
    has_reference=False,
    charts=("loss", "token_accuracy"),
    panel_fields=(LOSS,),
    memory_phases=("cross_entropy", "layer", "evaluation"),
)
DPO = Stage(
    name="dpo",
    title="Direct preference optimisation",
    label="DPO",
    row_kind="pair",
    sequences_per_row=2,
    continues=("sft",),
    has_reference=True,
    charts=("pair_loss", "reward_margin", "reward_accuracy", "rewards", "log_probs"),
    panel_fields=(
        LOSS,
        PanelField("rewards/margins", "margin", "{:.3f}", has_curve=True),
        PanelField("rewards/accuracies", "accuracy", "{:.0%}", first_step=FIRST_STEP_APART),
    ),
    memory_phases=("log_probs", "layer", "reference", "evaluation"),
    report_extras=("reference", "shared_prompts"),
)

REWARD = Stage(
    name="reward",
    title="Reward model",
    label="reward model",
    row_kind="pair",
    sequences_per_row=2,
    continues=("sft",),
    has_reference=False,
    charts=("loss", "score_margin", "pair_accuracy", "scores"),
    panel_fields=(
        LOSS,
        PanelField("margin", "margin", "{:.3f}", has_curve=True),
        PanelField("accuracy", "accuracy", "{:.0%}"),
    ),
    memory_phases=("score", "layer", "evaluation"),
    task="seq_cls",
)

KTO = Stage(
    name="kto",
    title="Kahneman-Tversky optimisation",
    label="KTO",
    row_kind="labelled",
    sequences_per_row=1,
    continues=("sft",),
    has_reference=True,
    charts=("labelled_loss", "labelled_margin", "kl", "labelled_rewards", "labelled_log_probs"),
    panel_fields=(
        LOSS,
        PanelField("rewards/margins", "margin", "{:.3f}", has_curve=True),
        PanelField("kl", "KL", "{:.3f}"),
    ),
    memory_phases=("log_probs", "layer", "reference", "evaluation"),
    report_extras=("reference", "class_balance"),
    across_processes=False,  # its KL term looks at all rows of a step
)

RL = Stage(
    name="rl",
    title="Learning from rewards",
    label="RL",
    row_kind="prompt",
    sequences_per_row=1,
    continues=("dpo", "sft"),
    has_reference=False,
    charts=("reward", "kl_to_start", "entropy", "completion_tokens", "completions_ended", "correct"),
    panel_fields=(
        PanelField("reward", "reward", "{:.3f}", has_curve=True),
        PanelField("kl", "KL", "{:.4f}"),
        PanelField("entropy", "entropy", "{:.3f}"),
        PanelField("completions/mean_length", "tokens", "{:.1f}"),
        PanelField("completions/ended_ratio", "ended", "{:.0%}"),
    ),
    memory_phases=("generation", "scoring", "log_probs", "layer"),
    report_extras=("reward_learning",),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in (SFT, DPO, REWARD, KTO, RL)}


BASE = "base"  # the model itself, beside the names of what was trained of it
LABEL = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")  # part of a folder's name, and of a module's in PEFT


def of(name: str) -> Stage:
    """The stage of that name, or that a variant is of."""
    return STAGES[name.partition("-")[0]]


def variant(stage: str, label: str | None) -> str:
    """The name of a variant: `dpo-beta02` is DPO under the label beta02, `dpo` the one without a label.

    It names the run's folder, and the model in comparisons, evaluations and exports.
    """
    return stage if label is None else f"{stage}-{label}"


def label_of(name: str) -> str | None:
    return name.partition("-")[2] or None


def is_variant(name: str) -> bool:
    stage, dash, label = name.partition("-")
    return stage in STAGES and (not dash or LABEL.fullmatch(label) is not None)


def title(name: str) -> str:
    """A variant, or the base, as tables head it: "DPO beta02"."""
    return name if name == BASE else " ".join(filter(None, (of(name).label, label_of(name))))


def in_order(names: Iterable[str]) -> list[str]:
    """The base first, then the variants of each stage in the order of the stages."""
    order = (BASE, *STAGES)
    return sorted(names, key=lambda name: order.index(name.partition("-")[0]))


def of_kind(kind: RowKind) -> Stage:
    """The first stage whose rows are of this kind."""
    return next(stage for stage in STAGES.values() if stage.row_kind == kind)


def names() -> tuple[str, ...]:
    return tuple(STAGES)


def answering() -> tuple[str, ...]:
    """Names of those whose models can be asked, and so compared."""
    return tuple(name for name, stage in STAGES.items() if stage.answers)


def lineage(name: str) -> list[Stage]:
    """The stages whose values shape the adapter of this one, or of a variant of it: those before it, itself last."""
    before = {earlier for start in of(name).continues for earlier in (s.name for s in lineage(start))}
    return [stage for stage in STAGES.values() if stage.name in before | {of(name).name}]
