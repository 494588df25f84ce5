"""benchmarks/gpu.py at tiny size, so that every line of it has run before somebody pays for a card."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import gpu
from benchmarks.card import figures, memory_points, rows, view
from benchmarks.card.measurements import MEASUREMENTS, Measurement, pinned
from benchmarks.card.place import STAND_IN, Failed, Place
from benchmarks.card.results import Clock, Results
from benchmarks.card.variants import VARIANTS
from toolkit.data.rows import to_messages
from toolkit.errors import UserError
from toolkit.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.campaign
def test_the_whole_program_at_tiny_size(tmp_path: Path) -> None:
    words = (
        "--tiny",
        "--out",
        str(tmp_path / "tiny.json"),
        "--work",
        str(tmp_path / "work"),
        "--minutes",
        "60",
    )
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((tmp_path / "tiny.json").read_text())["points"]
    assert set(points) == {measurement.name for measurement in MEASUREMENTS}
    assert not [name for of_one in points.values() for name, found in of_one.items() if "failed" in found]
    assert points["embedded"]["dpo"]["proof"] and points["embedded"]["dpo"]["reference"]["first_step"]
    for measurement, stage in (("recovery", "sft"), ("resume", "dpo")):
        assert set(points[measurement][stage]["difference"].values()) == {0.0}  # a CPU repeats its sums
    assert len(points["resume"]["dpo"]["resumed_at_steps"]) == 1
    ours, stock = points["baseline"]["dpo"], points["speed"]["stock dpo 1"]
    assert len(ours["step_seconds"]) == len(stock["step_seconds"]) == gpu.TINY.steps
    assert abs(sum(ours["step_tokens"]) / sum(stock["step_tokens"]) - 1) < 0.1  # the same rows
    again = run(*words)
    assert again.returncode == 0 and not re.search(r"\d s left", again.stdout)  # nothing is measured twice


def test_without_a_gpu_the_full_size_is_refused_with_what_can_be_run(tmp_path: Path) -> None:
    if gpu.hardware.here().gpu is None:
        done = run("--out", str(tmp_path / "x.json"))
        assert done.returncode == 2 and "--tiny" in done.stderr
        assert not (tmp_path / "x.json").exists()


# Starts that go on where the last one ended ------------------------------------------------------------------------


class Recorded:
    """A table of two measurements that note what was asked of them."""

    def __init__(self, *fail: str):
        self.fail, self.asked = set(fail), []  # type: ignore[var-annotated]
        self.table = [
            Measurement(name, "?", seconds, lambda place: ["one", "two"], self.measure)
            for name, seconds in (("quick", 1.0), ("slow", 1000.0))
        ]

    def measure(self, place: Place, point: str) -> dict[str, Any]:
        self.asked.append(point)
        if point in self.fail:
            raise Failed("said so")
        return {"figure": len(self.asked)}


def started(recorded: Recorded, file: Path, seconds: float = 100.0, **other: Any) -> tuple[int, Results]:
    results = Results.of(file, {"card": None} | other)
    place = Place(gpu.TINY, file.parent, Clock(seconds), None)
    return gpu.measure(results, place, recorded.table, Console(quiet=True)), results


def test_a_start_measures_what_its_time_allows_and_the_next_one_goes_on(tmp_path: Path) -> None:
    recorded = Recorded()
    assert started(recorded, tmp_path / "r.json")[0] == 2  # the slow ones would not end in time
    assert recorded.asked == ["one", "two"]
    left, results = started(recorded, tmp_path / "r.json", seconds=5000.0)
    assert left == 0 and recorded.asked == ["one", "two"] * 2
    assert results.figures("quick", "two")["figure"] == 2 and results.figures("slow", "one")["figure"] == 3


def test_a_point_that_fails_is_tried_once_more_and_then_left(tmp_path: Path) -> None:
    recorded = Recorded("one")
    assert [started(recorded, tmp_path / "r.json")[0] for _ in range(3)] == [3, 2, 2]
    assert recorded.asked == ["one", "two", "one"]
    _, results = started(recorded, tmp_path / "r.json")
    assert results.points["quick"]["one"]["failed"] == "said so" and results.figures("quick", "one") is None


def test_a_point_that_the_clock_cut_off_begins_again_only_with_the_time_that_it_takes(tmp_path: Path) -> None:
    recorded = Recorded()
    recorded.measure = lambda place, point: time.sleep(0.2) or place.wait(sleeping())  # type: ignore[method-assign]
    recorded.table = [Measurement("quick", "?", 0.1, lambda place: ["one"], recorded.measure)]
    assert started(recorded, tmp_path / "r.json", seconds=0.3)[0] == 1
    _, results = started(recorded, tmp_path / "r.json", seconds=0.1)
    assert "the clock ran out" in results.points["quick"]["one"]["failed"]
    assert results.points["quick"]["one"]["attempts"] == 1 and results.longest_seconds("quick") > 0.2


def sleeping() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], text=True)


def test_figures_of_two_cards_never_share_a_file(tmp_path: Path) -> None:
    started(Recorded(), tmp_path / "r.json")
    with pytest.raises(UserError, match="card: None there, NVIDIA L4 here"):
        started(Recorded(), tmp_path / "r.json", card="NVIDIA L4")


# What the figures say ---------------------------------------------------------------------------------------------


def points(scales: tuple[float, float, float], constant: float) -> list[dict[str, Any]]:
    """The full size's points, 'measured' as the plan with other constants would have them."""
    made = []
    for number, point in enumerate(gpu.FULL.points):
        planned, _ = memory_points.planned(gpu.FULL.recipe, point, 3, STAND_IN)
        parts = [sum(planned.items_gib[name] for name in names) for names in memory_points.SCALED]
        peak = planned.peak_gib + constant + float(np.dot(parts, np.array(scales) - 1))
        measured = {"peak_gib": peak, "step_seconds": [1.0], "steps": 3, "events": []}
        made.append(memory_points.described(point, number, planned, measured))
    return made


def test_the_fit_finds_the_constants_and_tells_the_error_on_points_it_has_not_seen() -> None:
    found = memory_points.fit(points((1.1, 0.8, 1.3), 0.2))
    assert found is not None
    assert list(found["scales"].values()) == pytest.approx([1.1, 0.8, 1.3])
    assert found["constant_gib"] == pytest.approx(0.2)
    assert found["worst_error"] == pytest.approx(0, abs=1e-9)
    assert abs(found["worst_error_of_the_plan_as_it_is"]) > 0.02
    assert (found["num_fitted"], found["num_held_out"]) == (13, 12)


def test_a_point_that_ran_out_of_memory_is_no_measurement() -> None:
    all_points = points((1, 1, 1), 0)
    for point in all_points[6:]:
        point["events"] = [{"where": "training"}]
    assert memory_points.fit(all_points) is None


def test_every_point_is_what_its_name_says_and_fits_the_stand_in() -> None:
    assert len({memory_points.name(point) for point in gpu.FULL.points}) == 25
    for point in gpu.FULL.points:
        stage, packed, kept, num_rows, tokens, chunk = point
        plan, recipe = memory_points.planned(gpu.FULL.recipe, point, 3, STAND_IN)
        assert plan.fits, memory_points.name(point)
        settings = plan.settings
        assert (settings.recompute_layers, settings.loss_chunk_gib) == (32 - kept, chunk)
        assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (num_rows, 1)
        assert recipe.sft and recipe.sft.packing == packed
        assert plan.tokens_per_step == num_rows * tokens * (2 if stage == "dpo" else 1)


def test_the_main_job_is_planned_as_on_the_stand_in_and_every_variant_loads(tmp_path: Path) -> None:
    large = gpu.hardware.Gpu("NVIDIA H200", 139.7, 139.0, (9, 0), "580", (13, 0))
    (tmp_path / f"base-{gpu.FULL.recipe}").symlink_to(ROOT / "recipes" / "tiny" / "base")
    place = Place(replace(gpu.FULL, steps=1), tmp_path / "of-these-results", Clock(1), large)
    place.work.mkdir()
    assert place.is_held and place.card is STAND_IN
    for variant in VARIANTS:
        plan = place.plan(variant.stage, *variant.settings)
        chosen = place.plan(variant.stage).settings
        assert (
            replace(place.plan(variant.stage, *pinned(place, variant)).settings, loss_chunk_gib=0.5) == chosen
        )
        shipped = memory_points.plan_stage(
            load(gpu.FULL.recipe, variant.settings), variant.stage, STAND_IN, 64
        )
        assert variant.against in {None, *(other.name for other in VARIANTS)}
        assert plan.fits and plan.budget_gib == pytest.approx(shipped.budget_gib)
        assert plan.settings == shipped.settings


def test_rows_are_as_long_as_they_are_drawn(tmp_path: Path) -> None:
    recipe = load("tiny", ("sft.max_length=2048", "dpo.max_length=2048"))
    rows.write(recipe, tmp_path, num_chats=300, num_pairs=50)
    chats = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    words = [sum(len(turn["content"].split()) for turn in to_messages(row, "messages")) for row in chats]
    assert 0.8 * rows.SFT_MEAN < np.mean(words) < 1.1 * rows.SFT_MEAN and max(words) <= 2048
    pairs = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    stock = [json.loads(line) for line in (tmp_path / "stock_dpo.jsonl").read_text().splitlines()]
    assert all(ours["prompt"] in theirs["prompt"] for ours, theirs in zip(pairs, stock, strict=True))


def test_what_is_shown_of_a_file_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "r.json", {}, "id")
    run_figures = {
        "planned_peak_gib": 20.0, "peak_gib": 19.0, "peak_reserved_gib": 19.5, "reference": None,
        "probe": {"peak_gib": 19.1, "tokens": 4096}, "step_tokens": [9, 4000, 4000], "step_seconds": [9, 1.0, 1.0],
    }  # fmt: skip
    slow = run_figures | {"step_seconds": [9, 2.0, 2.0], "micro_batch": 2}
    apart = {"difference": {"adapter": 1e-4, "trained_part": 2e-4, "loss": 0.0}}
    for name, point, found in (
        ("baseline", "sft", run_figures),
        ("speed", "stock sft 1", slow),
        ("recovery", "sft", apart | {"oom_events": [1, 2]}),
        ("variants", "compiled layers", slow | {"stage": "sft", "against": None}),
        ("bf16", "bf16", {"tflops": 240.0}),
    ):
        results.put(name, point, found, 1.0)
    for number, found in enumerate(points((1, 1, 1), 0.1)):
        results.put("memory", str(number), found, 1.0)
    results.put_failure("attention", "attention", "it said why", 1.0)
    view.show(results, load(gpu.FULL.recipe).model.architecture, Console(width=200))
    shown = " ".join(capsys.readouterr().out.split())
    assert "4,000, 2,000: 2.00 times" in shown and "20.00, 19.00 GiB" in shown
    assert "share of the measured bf16 rate │ 50" in shown  # 30 GFLOP a token
    assert "2 out-of-memory errors" in shown and "2.0e-04" in shown
    assert "0.50 times the tokens/s of the baseline" in shown
    assert "embedded │ │ not measured" in shown and "it said why" in shown


def test_tokens_per_second_leaves_out_the_first_step() -> None:
    found = {"step_tokens": [5, 100, 200], "step_seconds": [50.0, 1.0, 2.0]}
    assert figures.tokens_per_second(found) == 100
    assert figures.tokens_per_second({"step_tokens": [None], "step_seconds": [None]}) is None
