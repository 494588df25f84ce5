"""What a run left in its folder, in numbers; and how far two adapters are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.records.record import read_lines, read_object
from toolkit.run.rundir import WEIGHTS

TRAINED = "lora_B"  # 0 before training: all of it was trained


def is_finished(folder: Path) -> bool:
    return bool(read_object(folder / "report.json").get("outcome") == "finished")


def steps(folder: Path) -> list[dict[str, Any]]:
    """The logs of a run that logs every step."""
    return [entry for entry in read_lines(folder / "metrics.jsonl") if "loss" in entry]


def of(folder: Path) -> dict[str, Any]:
    """Of one stage: memory, planned and measured, tokens and seconds of each step, what ran out, what was proved."""
    report = read_object(folder / "report.json")
    logs = steps(folder)
    fed = _each([entry.get("num_tokens") for entry in logs])
    return {
        "settings": report["settings"],
        "planned_peak_gib": report["planned_peak_gib"],
        "peak_gib": report["measured_peak_gib"],
        "peak_reserved_gib": max((entry.get("vram_reserved_gib") or 0 for entry in logs), default=0) or None,
        "probe": report["probe"],
        "step_tokens": fed,
        "step_seconds": [
            tokens and tokens / entry["tokens_per_second"] if "tokens_per_second" in entry else None
            for tokens, entry in zip(fed, logs, strict=True)
        ],
        "losses": [entry["loss"] for entry in logs],
        "train_tokens": report["train_tokens"],
        "reference": report.get("reference"),
        "oom_events": [
            {key: event[key] for key in ("where", "step", "action")} for event in report["oom_events"] or []
        ],
        "allocator": report["allocator"],
        "notes": report["notes"],
    }


def _each(totals: list[float | None]) -> list[float | None]:
    """What each step added to a running total."""
    before = [0, *totals[:-1]]
    return [None if now is None else now - (last or 0) for last, now in zip(before, totals, strict=True)]


def tokens_per_second(figures: dict[str, Any]) -> float | None:
    """Without the first step, which also warms up."""
    timed = [
        (tokens, seconds)
        for tokens, seconds in zip(figures["step_tokens"][1:], figures["step_seconds"][1:], strict=True)
        if tokens and seconds
    ]
    return sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed) if timed else None


def difference(one: Path, other: Path) -> dict[str, float]:
    """|a - b| / |b| of two runs' adapters, and of what was trained in them alone; the largest gap of their losses."""
    import numpy as np
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "adapter" / WEIGHTS) for folder in (one, other))
    if a.keys() != b.keys():
        raise ValueError(f"{one} and {other} hold adapters of other names")

    def apart(part: str) -> float:
        names = [name for name in b if part in name]
        gap = sum(float(np.square(a[name] - b[name]).sum()) for name in names)
        return float((gap / max(sum(float(np.square(b[name]).sum()) for name in names), 1e-30)) ** 0.5)

    losses = [of(folder)["losses"] for folder in (one, other)]
    return {
        "adapter": apart(""),
        "trained_part": apart(TRAINED),
        "loss": max((abs(x - y) for x, y in zip(*losses, strict=True)), default=0.0),
    }


def embedded(folder: Path) -> dict[str, Any]:
    """Of a script of the embedded recipe: what says that it did the right thing on this device."""
    report = read_object(folder / "report.json")
    if "models" in report:
        kept = ("ended_fraction", "correct_fraction", "matches", "tokens_per_second")
        models = report["models"].items()
        return {"device": report["device"], "models": {n: {key: m[key] for key in kept} for n, m in models}}
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    proof = [line.strip() for line in log.splitlines() if "the reference is the policy" in line]
    names = ("device", "num_steps", "train_tokens", "loss_first", "loss_last", "eval", "reference", "notes")
    return {name: report.get(name) for name in names} | {"proof": proof[-1] if proof else None}
