"""What a run of DPO or KTO proved before it trained: its reference is the policy, its shared prompts are the pairs."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from toolkit.recipe import stages
from toolkit.records.run_report import RunReport
from toolkit.report.tables import table


def section(report: RunReport) -> str:
    """Empty for a stage that has nothing to prove, or that did not come so far."""
    called = stages.of(report.stage).rows_are_called if report.stage in stages.STAGES else "rows"
    rows = [
        *_reference(report.reference or {}, called),
        *_shared(report.shared_prompts or {}),
        *_starting_policy(report.reward_learning or {}),
    ]
    return "<h2>Proved before training</h2>" + table([], rows) if rows else ""


def _reference(found: dict[str, Any], called: str) -> list[list[str]]:
    if not found:
        return []
    pairs = f"{found.get('pairs', 0):,} {called}, {found.get('reused', 0):,} of them found on disk"
    rows = [["reference log-probs are the policy's", pairs]]
    if step := found.get("first_step"):
        rows.append(
            [
                "first step: loss, margin",
                f"{step['loss']:.4f} ({_expected(step)}), {step['margin']:.4f} (at most {step['margin_limit']:g})",
            ]
        )
    return rows


def _starting_policy(found: dict[str, Any]) -> list[list[str]]:
    if not found.get("reference_weights"):
        return []
    rows = [
        ["KL reference is the policy that it started from", f"{found['reference_weights']:,} weights equal"]
    ]
    if (kl := found.get("kl_at_first")) is not None:
        rows.append(["first step: KL", f"{kl:g} nats a token (0 is expected)"])
    return rows


def _expected(step: dict[str, Any]) -> str:
    """Runs of an earlier version do not say; theirs was DPO's own loss."""
    formula, value = step.get("formula", "ln 2"), step.get("expected_loss", math.log(2))
    return f"{escape(formula)} = {value:.4f}"


def _shared(found: dict[str, Any]) -> list[list[str]]:
    if "off" in found:
        return [["prompts are run twice, once a reply", escape(found["off"])]]
    if not found:
        return []
    rows = [
        [
            "shared prompts against padded pairs",
            f"{found['median']:.1e} nats in the median, {found['worst']:.1e} at most, on {found['pairs']} pairs "
            f"(another padding: {found['median_noise']:.1e}, {found['worst_noise']:.1e}); {escape(found['kernel'])}",
        ]
    ]
    if "attention_calls" in found:
        calls = f"{found['attention_calls']:,} of {found['expected_calls']:,}"
        rows.append(["attention calls of the first step over shared prompts", calls])
    return rows
