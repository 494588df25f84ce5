"""What a sweep says of its runs: which differences are noise, and which values are of different things."""

from pathlib import Path
from typing import Any

from toolkit.files import write_json
from toolkit.records.sweep_report import Sweep
from toolkit.run.rundir import RunDir
from toolkit.sweep import ending, results
from toolkit.sweep.results import Result

EASY = {"dpo.learning_rate": 1e-6}
HARD = {"dpo.learning_rate": 1e-3}


def result(values: dict[str, Any], seed: int, accuracy: float, rows: str = "same") -> Result:
    run, held_out = RunDir(Path("runs"), "tiny", f"dpo-{seed}"), {"rewards/accuracies": accuracy, "loss": 0.5}
    return Result(run, values | {"seed": seed}, "finished", None, held_out, rows, 20, 60.0)


def accuracy(found: list[Result]) -> results.Compared:
    return next(one for one in results.compare("dpo", found) if one.field.key == "rewards/accuracies")


def test_what_is_more_than_noise() -> None:
    seeds = (1, 2, 3, 4)
    near = [result(EASY, seed, 0.8 + seed / 100) for seed in seeds]
    noisy = [result(HARD, seed, 0.79 + 0.02 * (seed % 2)) for seed in seeds]
    assert accuracy(near + noisy).verdict("learning_rate 0.001").startswith("noise")
    worse = [result(HARD, seed, 0.6 + seed / 90) for seed in seeds]
    found = accuracy(near + worse)
    assert found.best == "learning_rate 1e-06" and found.verdict(found.best) == "best"
    assert found.verdict("learning_rate 0.001").startswith("worse, p ")
    less = found.from_best["learning_rate 0.001"]
    assert less.difference < 0 and less.low < less.difference < less.high < 0


def test_what_is_not_compared_and_why() -> None:
    one_seed = [result(EASY, 1, 0.8), result(HARD, 1, 0.6)]
    assert (
        "one seed each" in accuracy(one_seed).why and accuracy(one_seed).verdict("learning_rate 0.001") == "-"
    )
    other_rows = [result(values, seed, 0.8, str(values)) for values in (EASY, HARD) for seed in (1, 2)]
    assert "hold out different rows" in accuracy(other_rows).why
    betas = [result({"dpo.beta": beta}, seed, 0.8 + seed / 50) for beta in (0.1, 0.2) for seed in (1, 2)]
    why = {one.field.key: one.why for one in results.compare("dpo", betas)}
    assert "made of dpo.beta" in why["loss"] and why["rewards/accuracies"] == ""


def test_the_page_has_every_run_and_a_dot_for_each_seed(tmp_path: Path) -> None:
    points = {
        f"dpo-r{rate}-seed{seed}": {"dpo.learning_rate": rate, "seed": seed}
        for rate in (1, 2)
        for seed in (1, 2)
    }
    for name, values in points.items():
        run = RunDir(tmp_path, "tiny", name)
        write_json(
            run.manifest,
            {"outcome": "finished", "started": "2026-11-20T19:35:57+00:00", "rows": {"eval": "a"}},
        )
        report = {
            "outcome": "finished",
            "eval": {"loss": 0.5 + values["seed"] / 10, "rewards/accuracies": 0.9},
        }
        write_json(run.report, report)
    points["dpo-r3-seed1"] = {"dpo.learning_rate": 3, "seed": 1}
    sweep = Sweep("tiny", "dpo", {"seed": [1, 2]}, points, {"dpo-r3-seed1": "</td><script>it did not fit"})
    file = tmp_path / "tiny" / "sweeps" / "dpo-seed" / "sweep.html"
    ending.write(tmp_path, sweep, file)
    page = file.read_text()
    assert page.count("class='seed'") == 8 and all(name in page for name in points)
    assert (
        "refused" in page and "&lt;/td&gt;&lt;script&gt;it did not fit" in page and "<script>it" not in page
    )
