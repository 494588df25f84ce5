"""What a run that learns from rewards wrote on the way: completions with their rewards, and the held-out measure."""

from __future__ import annotations

from html import escape
from typing import Any

from toolkit.report.run_record import RunRecord
from toolkit.report.tables import folded, number, table

NUM_STEPS = 6  # spread over the run; the last ones are open, the others folded


def section(record: RunRecord) -> str:
    """Empty for a stage that writes none."""
    learnt = record.report.reward_learning or {}
    if not (record.completions or learnt):
        return ""
    steps = sorted({line["step"] for line in record.completions if isinstance(line.get("step"), int)})
    if len(steps) > NUM_STEPS:
        steps = [steps[place * (len(steps) - 1) // (NUM_STEPS - 1)] for place in range(NUM_STEPS)]
    of_steps = [
        (step, "".join(_completion(line) for line in record.completions if line.get("step") == step))
        for step in steps
    ]
    shown = "".join(
        f"<h3>Step {step:,}</h3>{body}" if step == steps[-1] else folded(f"Step {step:,}", body)
        for step, body in of_steps
    )
    about = (
        '<p class="quiet">The best, the median and the worst completion of a step, by its whole reward.</p>'
    )
    return f"<h2>Rewards</h2>{_rewards(learnt)}{_held_out(learnt)}" + (
        f"<h2>Completions</h2>{about}{shown}" if shown else ""
    )


def _completion(line: dict[str, Any]) -> str:
    rewards = line.get("rewards")
    parts = rewards.items() if isinstance(rewards, dict) else ()
    listed = ", ".join(
        f"{escape(name)} {number(value, '{:.3g}')}" for name, value in parts if value is not None
    )
    how = "" if line.get("ended") else ' · <span class="endless">cut</span>'
    text = escape(str(line.get("text") or "")) or '<span class="quiet">(empty)</span>'
    return (
        f'<article><h3>{escape(str(line.get("prompt") or ""))}</h3><div class="pair"><div><span class="quiet">'
        f"{escape(str(line.get('which')))} · reward {number(line.get('reward'), '{:.3g}')} ({listed}) · "
        f"{number(line.get('num_tokens'), '{:,}')} tokens{how}</span><p>{text}</p></div></div></article>"
    )


def _rewards(learnt: dict[str, Any]) -> str:
    rows = [
        [escape(name), *(number(found.get(key), "{:.3f}") or "-" for key in ("first", "last", "spread"))]
        for name, found in {**(learnt.get("rewards") or {}), "sum": learnt.get("reward") or {}}.items()
    ]
    if not learnt.get("rewards"):
        return ""
    about = (
        '<p class="quiet">Means over completions. Spread: among those to one prompt, which alone are compared '
        "with each other.</p>"
    )
    return about + table(["reward", "first step", "last step", "spread"], rows)


def _held_out(learnt: dict[str, Any]) -> str:
    found = learnt.get("held_out_correct")
    if not found:
        return '<p class="quiet">Held-out prompts were measured by the rewards alone: their rows hold no answers.</p>'
    rows = [
        [name, f"{found[key]['value']:.1%}", f"{found[key]['low']:.1%} to {found[key]['high']:.1%}"]
        for name, key in (("before the first step", "before"), ("at the end", "after"))
    ]
    apart = found["difference"]
    rows.append(["difference", f"{apart['difference']:+.1%}", f"{apart['low']:+.1%} to {apart['high']:+.1%}"])
    return (
        f'<p class="quiet">Right ones of the completions sampled to {found["before"]["num_rows"]:,} held-out prompts, '
        f"with 95 % intervals:</p>{table(['', 'right', '95 %'], rows)}"
    )
