"""Whether an exported reward model is the one that was trained: both score the same conversations.

The trained model scores held-out pairs through the toolkit, the export is loaded by its own consumer in a fresh process
(consumer.py), renders the same conversations with its own tokenizer and template, and scores them.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.data.rows import Pair
from toolkit.data.turns import Messages
from toolkit.engine.data import preparation
from toolkit.engine.data.reading import load_item
from toolkit.engine.export import parity
from toolkit.engine.inference import reward_model
from toolkit.export.artefact import PARITY, Wanted
from toolkit.records.parity import ScoreParity, ScoreTolerance

PAIRS = 16  # enough to see another model by, seconds on a CPU

# In shares of the spread of the trained model's scores. Measured on the tiny recipe, on a CPU, beside each (maximum,
# mean); larger models, and GPUs, whose kernels round differently, were not measured.
SAME = ScoreTolerance(
    0.2, 0.05, 0.98, "bf16 activations rounded in another order; not measured where a CPU has bf16"
)
MERGED = ScoreTolerance(0.2, 0.05, 0.98, "merged weights and head rounded once to bf16")
UNQUANTISED = ScoreTolerance(1.5, 0.5, 0.9, "the base's NF4 error")


@dataclass(frozen=True)
class Scored:
    """What the trained model says of conversations: their token ids and scores, and the dtype that it computed in."""

    conversations: list[Messages]
    rendered: list[list[int]]
    scores: torch.Tensor
    dtype: str

    @property
    def request(self) -> dict[str, Any]:
        return {"scored": self.conversations}


def trained(wanted: Wanted) -> Scored:
    """The trained model's scores of held-out pairs, of trained ones where there are none; it is let go again."""
    conversations = _conversations(wanted)
    loaded = reward_model.load(str(wanted.run.adapter))
    scored = Scored(
        conversations,
        loaded.encode(conversations),
        loaded.score(conversations),
        str(loaded.model.dtype).removeprefix("torch."),
    )
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scored


def verify(wanted: Wanted, base: Path | None, scored: Scored, dtype: str, ask: parity.Ask) -> ScoreParity:
    """Compares, writes parity.json, and sets the export aside when it is not the trained model."""
    recipe, path = wanted.recipe, str(wanted.temporary)
    common = {"trust_remote_code": recipe.model.trust_remote_code, "quantise": False, "dtype": dtype}
    from_trained, problems = None, []
    if base is None:
        load = common | {"kind": "adapter", "path": path, "quantise": recipe.model.load_in_4bit}
        got = ask([load], scored)[0]
        measured = _difference(got["scores"], scored.scores, SAME, "the model as it was trained")
    else:
        unmerged = {"kind": "unmerged", "path": str(wanted.run.adapter), "base": str(base), "revision": None}
        got, other = ask([common | {"kind": "merged", "path": path}, common | unmerged], scored)
        against = "the 16-bit base with the adapter beside it"
        measured = _difference(got["scores"], torch.tensor(other["scores"]), MERGED, against)
        unquantised = _difference(got["scores"], scored.scores, UNQUANTISED, "the model as it was trained")
        from_trained, problems = unquantised.mean_score_diff, _problems(unquantised)
    problems = _problems(measured) + problems
    if got["rendered"] != scored.rendered:
        problems.append("it makes other tokens of the same conversations: another chat template or tokenizer")
    result = replace(
        measured,
        dtype=dtype,
        num_conversations=len(scored.rendered),
        problems=problems,
        passed=not problems,
        from_trained=from_trained,
    )
    result.write(wanted.temporary / PARITY)
    if problems:
        wanted.reject(problems)
    return result


def _difference(
    scores: list[float], other: torch.Tensor, tolerance: ScoreTolerance, against: str
) -> ScoreParity:
    mine, theirs = torch.tensor(scores).double(), other.double()
    spread = theirs.std().clamp(min=1e-6)
    apart = (mine - theirs).abs() / spread
    gaps = theirs[:, None] - theirs[None, :]
    same = (mine[:, None] - mine[None, :]) * gaps > 0
    return replace(
        ScoreParity.unknown(),
        max_score_diff=apart.max().item(),
        mean_score_diff=apart.mean().item(),
        equal_order_fraction=((gaps.abs() * same).sum() / gaps.abs().sum().clamp(min=1e-12)).item(),
        against=against,
        tolerance=tolerance,
    )


def _problems(measured: ScoreParity) -> list[str]:
    """What is beyond the tolerance, in words; NaN is beyond any."""
    tolerance, found = measured.tolerance, []
    assert tolerance is not None
    for key in ("max_score_diff", "mean_score_diff"):
        value, most = getattr(measured, key), getattr(tolerance, key)
        if not value <= most:
            found.append(
                f"{key} against {measured.against} is {value:.4f} of the scores' spread, at most {most:g} is expected"
            )
    if not measured.equal_order_fraction >= tolerance.equal_order_fraction:
        found.append(
            f"{measured.equal_order_fraction:.1%} of the pairs, weighed by how far apart they are, are in the order of "
            f"{measured.against}, at least {tolerance.equal_order_fraction:.0%} are expected"
        )
    return found


def _conversations(wanted: Wanted) -> list[Messages]:
    section = wanted.recipe.section(wanted.run.stage)
    with tempfile.TemporaryDirectory() as folder:
        sides = preparation.select(wanted.recipe, section, "pair", Path(folder))
        pool, selection = sides.get("eval") or sides["train"]
        items = [load_item(text) for text in pool.rows.select(selection.rows[: 4 * PAIRS])["item"]]
    pairs = [item for item in items if isinstance(item, Pair)][:PAIRS]
    return [pair.prompt + reply for pair in pairs for reply in (pair.chosen, pair.rejected)]
