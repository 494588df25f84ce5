"""What the figures say, on the screen and in words; what was not measured says so."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.card import figures, memory_points
from benchmarks.card.results import Results
from toolkit.memory import terms
from toolkit.recipe.schema import Architecture

NOT_MEASURED = "not measured"
Line = tuple[str, str]  # what, and its figure


def show(results: Results, architecture: Architecture, console: Console) -> None:
    """One table; a line for each figure that decides something."""
    table = Table("measurement", "what", "figure", title=f"{results.file}")
    for name, lines in conclusions(results, architecture).items():
        for number, (what, figure) in enumerate(lines or [("", NOT_MEASURED)]):
            table.add_row("" if number else name, what, figure)
        table.add_section()
    console.print(table)
    for measurement, points in results.points.items():
        for point, found in points.items():
            if "failed" in found:
                console.print(f"{measurement}, {point}: {found['failed']}", style="yellow", markup=False)


def conclusions(results: Results, architecture: Architecture) -> dict[str, list[Line]]:
    """Of every measurement, in the order of worth."""
    told: tuple[tuple[str, Callable[[], list[Line]]], ...] = (
        ("embedded", lambda: _embedded(results)),
        ("baseline", lambda: _baseline(results)),
        ("speed", lambda: _speed(results, architecture)),
        ("recovery", lambda: _apart(results, "recovery")),
        ("resume", lambda: _apart(results, "resume")),
        ("memory", lambda: _memory(results)),
        ("variants", lambda: _variants(results)),
        ("attention", lambda: _attention(results)),
        ("bf16", lambda: _bf16(results)),
    )
    return {name: lines() for name, lines in told}


def _done(results: Results, measurement: str) -> dict[str, dict[str, Any]]:
    names = results.points.get(measurement, {})
    return {name: found for name in names if (found := results.figures(measurement, name))}


def _embedded(results: Results) -> list[Line]:
    lines = []
    for script, found in _done(results, "embedded").items():
        for model, of_model in found.get("models", {}).items():
            shares = _share(of_model["ended_fraction"]), _share(of_model["correct_fraction"])
            lines.append((f"{model}: answers that end, that are correct", ", ".join(shares)))
        if "models" not in found:
            loss = f"{found['loss_first']:.3f} -> {found['loss_last']:.3f}"
            lines.append((f"{script}: loss, tokens", f"{loss}, {found['train_tokens'] or NOT_MEASURED}"))
        lines += _first_step(found)
        if found.get("proof"):
            lines.append(("the proof", found["proof"].rpartition("): ")[2]))
    return lines


def _baseline(results: Results) -> list[Line]:
    lines = []
    for stage, found in _done(results, "baseline").items():
        planned, probe = found["planned_peak_gib"], found["probe"]
        lines.append(
            (f"{stage}: peak, planned and measured", f"{planned:.2f}, {_gib(found['peak_gib'])} GiB")
        )
        lines.append(
            (f"{stage}: the probe's peak, its tokens", f"{_gib(probe['peak_gib'])} GiB, {probe['tokens']}")
        )
        lines += _first_step(found)
    return lines


def _first_step(found: dict[str, Any]) -> list[Line]:
    first = (found.get("reference") or {}).get("first_step")
    if not first:
        return []
    return [("margin of the first step, its limit", f"{first['margin']:.4f}, {first['margin_limit']:g}")]


def rates(results: Results, stage: str) -> dict[str, float]:
    """Tokens per second of the toolkit and of the stock script: medians of the rounds."""
    rounds = {"toolkit": [results.figures("baseline", stage)], "stock": []}
    for point, found in _done(results, "speed").items():
        who, of_stage, _ = point.split()
        if of_stage == stage:
            rounds[who].append(found)
    measured = {
        who: [rate for found in of_who if found and (rate := figures.tokens_per_second(found))]
        for who, of_who in rounds.items()
    }
    return {who: statistics.median(of_who) for who, of_who in measured.items() if of_who}


def _speed(results: Results, architecture: Architecture) -> list[Line]:
    lines, bf16 = [], results.figures("bf16", "bf16")
    for stage in ("sft", "dpo"):
        rate = rates(results, stage)
        ours, stock = results.figures("baseline", stage), results.figures("speed", f"stock {stage} 1")
        if ours and stock and rate.keys() == {"toolkit", "stock"}:
            both = f"{rate['toolkit']:,.0f}, {rate['stock']:,.0f}"
            who = f"toolkit, stock (micro-batches of {stock['micro_batch']})"
            lines.append(
                (f"{stage}: tokens/s, {who}", f"{both}: {rate['toolkit'] / rate['stock']:.2f} times")
            )
            peaks = f"{_gib(ours['peak_gib'])}, {_gib(stock['peak_gib'])} GiB"
            lines.append((f"{stage}: peak, toolkit, stock", peaks))
        if bf16 and "toolkit" in rate:
            useful = rate["toolkit"] * terms.flops_per_token(architecture, 0) / 1e12
            lines.append((f"{stage}: share of the measured bf16 rate", f"{useful / bf16['tflops']:.1%}"))
    return lines + _apart(results, "speed")


def _apart(results: Results, measurement: str) -> list[Line]:
    lines = []
    for point, found in _done(results, measurement).items():
        if "difference" not in found:
            continue
        happened = ""
        if "oom_events" in found:
            happened = f", {len(found['oom_events'])} out-of-memory errors"
        if found.get("resumed_at_steps"):
            happened = f", went on at step {', '.join(map(str, found['resumed_at_steps']))}"
        apart = ", ".join(f"{what.replace('_', ' ')} {gap:.1e}" for what, gap in found["difference"].items())
        lines.append((f"{point}: relative difference from the baseline{happened}", apart))
    return lines


def _memory(results: Results) -> list[Line]:
    points = list(_done(results, "memory").values())
    found = memory_points.fit(points)
    if not found:
        return [("points", str(len(points)))] if points else []
    scales = ", ".join(f"{name} x {scale:.2f}" for name, scale in found["scales"].items())
    as_it_is, fitted = found["worst_error_of_the_plan_as_it_is"], found["worst_error"]
    return [
        (f"worst error on {found['num_held_out']} held-out points, the plan as it is", f"{as_it_is:+.1%}"),
        (f"... with constants fitted on the other {found['num_fitted']}", f"{fitted:+.1%}"),
        ("the constants", f"{scales}, and {found['constant_gib']:+.2f} GiB"),
    ]


def _variants(results: Results) -> list[Line]:
    lines = []
    for name, found in _done(results, "variants").items():
        against = ("variants", found["against"]) if found["against"] else ("baseline", found["stage"])
        one, other = (of and figures.tokens_per_second(of) for of in (found, results.figures(*against)))
        beside = found["against"] or "the baseline"
        speed = f"{one / other:.2f} times the tokens/s of {beside}" if one and other else NOT_MEASURED
        memory = f"peak {_gib(found['peak_gib'])}, reserved {_gib(found['peak_reserved_gib'])} GiB"
        lines.append((f"{found['stage']} with {name}", f"{speed}, {memory}"))
    return lines


def _attention(results: Results) -> list[Line]:
    found = results.figures("attention", "attention")
    if not found:
        return []
    seconds = ", ".join(f"{kind} {statistics.median(of):.3f}" for kind, of in found["step_seconds"].items())
    return [(f"seconds of a dense step of {found['tokens']} tokens", seconds)]


def _bf16(results: Results) -> list[Line]:
    found = results.figures("bf16", "bf16")
    return [("bf16 products", f"{found['tflops']:.1f} TFLOP/s")] if found else []


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def _gib(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"
