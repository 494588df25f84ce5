"""benchmarks/gpu.py at tiny size, so that every line of it has run before somebody pays for a card."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from toolkit.memory.plan import Settings

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.long
def test_the_whole_path_at_tiny_size(tmp_path: Path) -> None:
    done = run("--tiny", "--out", str(tmp_path / "deep" / "tiny.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "deep" / "tiny.json").read_text())
    assert results["command"].startswith("python benchmarks/gpu.py --tiny")
    assert len(results["points"]) == len(gpu.TINY.points)
    assert set(results["versions"]) == set(gpu.LIBRARIES)
    assert set(results["speed"]) == {"sft", "dpo"}
    for speeds in results["speed"].values():
        assert len(speeds["step_seconds"]["toolkit"]) == len(speeds["step_seconds"]["stock"]) > 0
    assert results["recovery"]["steps"] == 2 and len(results["recovery"]["events"]) == 1
    if not results["measured"]:
        assert results["card"] is None and results["fit"] is None
        assert "not measured" in done.stdout


def test_without_a_gpu_the_full_size_is_refused_with_what_can_be_run(tmp_path: Path) -> None:
    if gpu.hardware.here().gpu is None:
        done = run("--out", str(tmp_path / "x.json"))
        assert done.returncode == 1 and "--tiny" in done.stderr


def points(scales: tuple[float, float, float], constant: float) -> list[dict[str, Any]]:
    """The full size's points, 'measured' as the plan with other constants would have them."""
    made = []
    for number, point in enumerate(gpu.FULL.points):
        planned, _ = gpu.plan_of(gpu.FULL, *point)
        parts = [sum(planned.items_gib[name] for name in names) for names in gpu.SCALED]
        peak = planned.peak_gib + constant + float(np.dot(parts, np.array(scales) - 1))
        measured = {"peak_gib": peak, "step_seconds": [1.0], "steps": 3, "events": []}
        made.append(gpu.describe(number, point, planned, measured))
    return made


def test_the_fit_finds_the_constants_and_tells_the_error_on_points_it_has_not_seen() -> None:
    found = gpu.fit(points((1.1, 0.8, 1.3), 0.2))
    assert found is not None
    assert list(found["scales"].values()) == pytest.approx([1.1, 0.8, 1.3])
    assert found["constant_gib"] == pytest.approx(0.2)
    assert found["worst_error"] == pytest.approx(0, abs=1e-9)
    assert abs(found["worst_error_of_the_plan_as_it_is"]) > 0.02
    assert len(found["held_out_errors"]) == len(gpu.FULL.points) // 2


def test_a_point_that_ran_out_of_memory_is_no_measurement() -> None:
    all_points = points((1, 1, 1), 0)
    for point in all_points[6:]:
        point["events"] = [{"where": "training"}]
    assert gpu.fit(all_points) is None


def test_every_full_point_is_planned_on_the_stand_in() -> None:
    plans = [gpu.plan_of(gpu.FULL, *point)[0] for point in gpu.FULL.points]
    assert sum(plan.fits for plan in plans) >= 20
    assert all(plan.settings.gradient_accumulation_steps == 1 for plan in plans)
    stage, kept, rows, tokens, chunk = gpu.FULL.points[1]
    assert plans[1].settings == Settings(rows, 1, 32 - kept, chunk)
    assert plans[1].tokens_per_step == rows * tokens and plans[1].stage == stage


def test_what_does_not_fit_the_oom_trial_does_not_fit_the_card() -> None:
    planned, _ = gpu.plan_of(gpu.FULL, "sft", 32, gpu.FULL.too_many, gpu.FULL.max_length, 2.0)
    assert planned.peak_gib > gpu.STAND_IN.total_gib


def test_the_holder_says_what_it_holds_and_ends_with_its_block(capfd: pytest.CaptureFixture[str]) -> None:
    with gpu.memory_held(1000.0):
        assert capfd.readouterr().out == "0.0 GiB held\n"


def test_the_table_of_measured_points(capsys: pytest.CaptureFixture[str]) -> None:
    all_points = points((1.0, 1.0, 1.0), 0.1)
    rates = {"toolkit": 4000.0, "stock": 2500.0}
    gpu.show(
        {
            "points": all_points,
            "fit": gpu.fit(all_points),
            "speed": {"sft": {"tokens_per_second": rates, "toolkit_over_stock": 1.6, "useful_tflops": 120.0}},
            "bf16_tflops": 150.0,
            "recovery": {"events": [1, 2], "steps": 2},
            "allocator": {"effective": {"expandable_segments": True}},
            "measured": True,
        }
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "1.60x, 80% of the 150.00 bf16 TFLOP/s" in shown
    assert "as it is" in shown and "2 events, 2 steps" in shown
    assert "not measured" not in shown
