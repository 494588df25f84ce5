"""How long the board takes to open over many runs: from the address to the list on the screen, in headless Chromium.

    python benchmarks/board.py [--runs 1000] [--steps 10000]

The runs are one that was written here, its metrics.jsonl linked so often. Also: a look again where nothing has changed,
and the curves of one run, Bokeh imported. Aim: the list within a second.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit.board.runs import Board
from toolkit.files import write_json
from toolkit.report import figures
from toolkit.run.rundir import RunDir

LIST = "() => document.querySelectorAll('#list tbody tr').length"


def make(root: Path, num_runs: int, num_steps: int) -> None:
    first = RunDir(root, "many", "dpo-0").metrics
    for number in range(num_runs):
        run = RunDir(root, "many", f"dpo-{number}")
        write_json(
            run.manifest,
            {"outcome": "finished", "started": "2026-11-20T19:35:57+00:00", "conditions": {"a": 1}},
        )
        if number:
            os.link(first, run.metrics)
            continue
        with first.open("w") as stream:
            for step in range(1, num_steps + 1):
                keys = (
                    "loss",
                    "rewards/margins",
                    "rewards/accuracies",
                    "learning_rate",
                    "grad_norm",
                    "num_tokens",
                )
                stream.write(
                    json.dumps({"step": step, **{key: 1 / (step + len(key)) for key in keys}}) + "\n"
                )


def timed(work: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_browser(root: Path, num_runs: int) -> float | None:
    """Seconds from the address to the rows; None without a browser."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        return None
    from playwright.sync_api import sync_playwright

    from tests.board.test_server import Served

    served = Served(root)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto("about:blank")
        begun = time.perf_counter()
        page.goto(served.url)
        while page.evaluate(LIST) < num_runs:
            page.wait_for_timeout(10)
        seconds = time.perf_counter() - begun
        browser.close()
    served.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, arguments.runs, arguments.steps)
        board = Board(root)
        for what, work in (
            ("the list, first", board.listed),
            ("the list, again", board.listed),
            ("Bokeh", figures.library),
            ("curves of a run, first", lambda: board.curves(["many/dpo-0"], "")),
            ("curves of a run, again", lambda: board.curves(["many/dpo-0"], "")),
        ):
            wall, cpu = timed(work)
            print(f"{what}: {wall:.2f} s, CPU {cpu:.2f} s")
        print(
            f"in the browser, from the address to {arguments.runs:,} rows: {in_browser(root, arguments.runs)} s"
        )


if __name__ == "__main__":
    main()
