"""report.html of a run that ended in any way, written from disk alone, and looked at in a real browser."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.in_browser import look_at, wait_until
from toolkit.errors import UserError
from toolkit.files import write_json
from toolkit.report import curves, figures, run_page, run_record
from toolkit.run.rundir import RunDir

HOSTILE = '</script><img src="https://example.org/x.png" onerror=alert(1)>'
MANIFEST = {
    "outcome": "finished",
    "reason": None,
    "started": "2026-11-20T19:35:57+00:00",
    "ended": "2026-11-20T21:37:07+00:00",
    "command": "run_dpo.py --recipe big",
    "gpu": {"name": "NVIDIA GeForce RTX 4090", "gib": 23.99, "driver": "580.65"},
    "cpu_count": 16,
    "packages": {"torch": "2.13.0", "trl": "1.15.0"},
    "plan": {"settings": {"recompute_layers": 4}, "peak_gib": 20.5, "items_gib": {"weights": 5.6, "context": 0.5}},
}  # fmt: skip


PROVED = {
    "outcome": "finished",
    "reference": {
        "pairs": 1200,
        "reused": 64,
        "seconds": 9.0,
        "first_step": {"loss": 0.6932, "margin": 0.0004, "margin_limit": 0.1},
    },
    "shared_prompts": {
        **{"kernel": "segments", "pairs": 16, "median": 1e-6, "worst": 2e-6, "median_noise": 1e-6},
        **{"worst_noise": 3e-6, "least": 0.02, "attention_calls": 64, "expected_calls": 64},
    },
}


def test_the_page_says_what_was_proved_before_training(tmp_path: Path) -> None:
    run = make_run(tmp_path, "dpo", 4)
    write_json(run.report, PROVED)
    page = run_page.page(record_of(run))
    for said in (
        "1,200 pairs, 64 of them found on disk",
        "0.6932 (ln 2 = 0.6931), 0.0004 (at most 0.1)",
        "1.0e-06 nats in the median, 2.0e-06 at most, on 16 pairs",
        "64 of 64",
    ):
        assert said in page
    write_json(run.report, {"outcome": "finished", "shared_prompts": {"off": "its attention <caps> logits"}})
    page = run_page.page(record_of(run))
    assert "prompts are run twice, once a reply" in page and "&lt;caps&gt;" in page
    run.report.unlink()
    assert "Proved before training" not in run_page.page(record_of(run))


def record_of(run: RunDir) -> run_record.RunRecord:
    record = run_record.read(run)
    assert record is not None
    return record


def make_run(root: Path, stage: str, num_steps: int, **facts: Any) -> RunDir:
    """A run as it would lie on disk, with logs of `num_steps` steps."""
    run = RunDir(root, "big", stage)
    write_json(run.manifest, MANIFEST | facts)
    with run.metrics.open("w") as stream:
        for step in range(1, num_steps + 1):
            entry: dict[str, Any] = {
                "step": step,
                "loss": 0.7 * math.exp(-step / num_steps) + 0.05 * math.sin(step),
                "learning_rate": 2e-5 * (1 - step / num_steps),
                "grad_norm": None if step == num_steps // 3 else 1 + math.cos(step),
                "num_tokens": 1000.0 * step,
                "tokens_per_second": 3000 + 100 * math.sin(step),
                "vram_gib": 12.5,
                "vram_reserved_gib": 21.0,
                "vram_peak_gib": 19 + math.sin(step),
            }
            for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
                sign = -1 if "rejected" in name else 1
                entry[name] = sign * step / num_steps + 0.1 * math.sin(step)
            entry |= {"rewards/margins": step / num_steps, "rewards/accuracies": step % 5 / 4}
            stream.write(json.dumps(entry) + "\n")
            if step % max(num_steps // 20, 1) == 0:
                evaluated = {"step": step, "eval_loss": 0.5, "eval_rewards/margins": 0.4}
                stream.write(json.dumps(evaluated) + "\n")
        stream.write('{"step": 10000000, "lo')  # a kill left half a line
    return run


def text_of(run: RunDir) -> str:
    written = run_page.write(run)
    assert written
    page = written.read_text()
    return page[: page.find("<script>")] if "<script>" in page else page


@pytest.mark.long
def test_a_run_of_100_000_steps_is_read_quickly_and_its_page_stays_small(
    tmp_path: Path, browser: Any
) -> None:
    run = make_run(tmp_path, "dpo", 100_000, resumed_at_steps=[40_000])
    started = time.process_time()
    assert run_page.write(run)
    assert time.process_time() - started < 15  # about 4 s; a busy machine
    assert run.page.stat().st_size < 3_000_000
    for width, scheme in ((1280, "light"), (400, "dark")):
        seen = look_at(browser, run.page, 9, width, scheme)
        assert len(seen.figures) == 9
        assert all(figure["width"] > 200 and figure["curve"] > 20 for figure in seen.figures)
        assert seen.requests == [run.page.as_uri()]
        assert seen.complaints == []
        assert seen.overflow <= 0
        seen.page.context.close()


def test_the_figures_follow_the_scheme_and_zoom_together(tmp_path: Path, browser: Any) -> None:
    run = make_run(tmp_path, "sft", 200)
    assert run_page.write(run)
    seen = look_at(browser, run.page, 5)
    page = seen.page
    ranges = """() => new Set([...Bokeh.documents[0].all_models]
        .filter((model) => model.type === "Figure").map((model) => model.x_range.start + " " + model.x_range.end))"""
    line_colour = """() => [...Bokeh.documents[0].all_models]
        .find((model) => model.type === "Line" && model.tags[0] === "--curve-1").line_color.value"""
    light = page.evaluate(line_colour)
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"() => ({line_colour})() !== '{light}'")
    before = page.evaluate(f"[...({ranges})()]")
    box = page.locator(".charts section").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.9, steps=4)
    page.mouse.up()
    wait_until(page, f"() => [...({ranges})()].join() !== '{before[0]}'")
    assert len(page.evaluate(f"[...({ranges})()]")) == 1
    assert seen.complaints == []
    page.context.close()


def test_a_table_wider_than_a_phone_scrolls_by_itself_and_keeps_its_labels(
    tmp_path: Path, browser: Any
) -> None:
    run = make_run(tmp_path, "sft", 0)
    measured = {"value": 0.875, "low": 0.8, "high": 0.925, "num_rows": 1234}
    models = {name: {"likelihood_accuracy": measured} for name in ("base", "sft", "dpo", "dpo-beta02")}
    write_json(run.of("eval").report, {"models": models})
    assert run_page.write(run)
    seen = look_at(browser, run.page, 0, 390)
    left, moved, shade = seen.page.evaluate("""() => {
        const table = document.querySelector(".wide table").parentElement;
        table.scrollLeft = 100;
        const label = [...table.querySelectorAll("td")].find((cell) => cell.textContent === "accuracy by likelihood");
        return [label.getBoundingClientRect().left - table.getBoundingClientRect().left, table.scrollLeft,
            getComputedStyle(table).backgroundImage];
    }""")
    assert seen.overflow <= 0 and (left, moved) == (0, 100) and "gradient" in shade
    seen.page.context.close()


def touch(page: Any, kind: str, *points: tuple[float, float]) -> None:
    fingers = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(points)]
    page.touching.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    page.wait_for_timeout(20)


def test_two_fingers_or_a_button_zoom_and_one_finger_scrolls(tmp_path: Path, browser: Any) -> None:
    run = make_run(tmp_path, "sft", 20)
    assert run_page.write(run)
    seen = look_at(browser, run.page, 5, 390, has_touch=True, is_mobile=True)
    page = seen.page
    page.touching = page.context.new_cdp_session(page)
    steps = """() => { const { start, end } = [...Bokeh.documents[0].all_models]
        .find((model) => model.type === "Figure").x_range; return end - start; }"""
    whole = page.evaluate(steps)
    figure = page.locator(".charts [role=img]").first
    assert "from 0.7" in figure.get_attribute("aria-label")
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    touch(page, "touchStart", (x - 30, y), (x + 30, y))
    for apart in range(30, 90, 10):
        touch(page, "touchMove", (x - apart, y), (x + apart, y))
    touch(page, "touchEnd")
    wait_until(page, f"() => ({steps})() < {0.9 * whole}")
    page.locator("[data-zoom='0']").tap()
    wait_until(page, f"() => ({steps})() === {whole}")
    page.locator("[data-zoom='.5']").tap()
    wait_until(page, f"() => ({steps})() === {whole / 2}")
    page.locator("[data-zoom='2']").tap()
    page.locator("[data-zoom='2']").tap()  # there is no more than all
    wait_until(page, f"() => ({steps})() === {whole}")

    figure.scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    touch(page, "touchStart", (x, y))
    for up in range(0, 200, 20):
        touch(page, "touchMove", (x, y - up))
    touch(page, "touchEnd")
    wait_until(page, f"() => scrollY > {before} + 50")
    assert page.evaluate(steps) == whole
    page.context.close()


def test_figures_have_titles_with_units_and_shares_their_whole_axis() -> None:
    from bokeh.models import Range1d

    series = run_record.Series([1, 2], [0.5, 0.6])
    for chart in (*curves.CHARTS.values(), *curves.OPTIMIZER, curves.MEMORY):
        plot = figures.figure_of(chart, {curve.key: series for curve in chart.curves}, Range1d(0, 3), [])
        assert plot.xaxis.axis_label == "optimizer step" and plot.yaxis.axis_label == chart.axis != ""
        if chart.is_share:
            assert (round(plot.y_range.start, 1), round(plot.y_range.end, 1)) == (0, 1)


def test_a_page_written_again_draws_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, drawn = make_run(tmp_path, "sft", 30), list[int]()
    draw = figures._drawn
    monkeypatch.setattr(figures, "_drawn", lambda *of: drawn.append(1) or draw(*of))  # type: ignore[func-returns-value]
    first = text_of(run)
    write_json(run.of("compare").report, {"models": {"base": {"ended_fraction": 0.25}}})
    again = text_of(run)
    assert len(drawn) == 1 and "ended by itself" in again and "25.0%" in again
    assert first.count("<!--") == again.count("<!--") > 0
    with run.metrics.open("a") as stream:
        stream.write('\n{"step": 31, "loss": 0.1}\n')
    text_of(run)
    assert len(drawn) == 2


def test_each_outcome_says_what_happened_and_what_the_same_command_does(tmp_path: Path) -> None:
    finished = text_of(make_run(tmp_path / "finished", "sft", 5))
    assert "Finished" in finished and "--fresh moves this run aside" in finished.replace("it ", "")

    reason = f"the disk is full {HOSTILE}"
    failed = text_of(make_run(tmp_path / "failed", "sft", 5, outcome="failed", reason=reason))
    assert "Failed" in failed and "the disk is full" in failed
    assert "starts from the first step" in failed
    assert "<img" not in failed

    stopped = make_run(tmp_path / "stopped", "sft", 5, outcome="interrupted", reason="stopped at step 5")
    checkpoint = stopped.checkpoints / "checkpoint-4"
    write_json(checkpoint / "sealed.json", {})
    write_json(checkpoint / "trainer_state.json", {"max_steps": 1500})
    write_json(stopped.checkpoints / "checkpoint-5" / "trainer_state.json", {})  # has no seal
    interrupted = text_of(stopped)
    assert "stopped at step 5" in interrupted
    assert "continues at step 4 of 1,500" in interrupted


def test_a_run_that_nobody_holds_any_more_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", 5, outcome="running", ended=None)
    with run.locked():
        assert "Running" in text_of(run)
    assert "Killed" in text_of(run)
    assert "planned 20.50 GiB" in text_of(run)  # from the manifest: it had no time for a report


def test_a_run_before_its_first_log_has_a_page_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "big", "sft")
    assert run_page.write(run) is None
    write_json(run.manifest, {"outcome": "failed", "reason": "no such model"})
    assert "nothing to draw" in text_of(run)
    assert "no such model" in text_of(run)


def test_answers_rows_and_measures_are_shown_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "dpo", 5)
    write_json(
        run.report, {"outcome": "finished", "answers": {"before": "sft", "after": "dpo"}, "notes": [HOSTILE]}
    )
    (run.path / "answers.jsonl").write_text(
        json.dumps(
            {
                "prompt": HOSTILE,
                "before": {"text": "Ünïcödé\n" * 3, "num_tokens": 64, "ended": False},
                "after": {"text": "", "num_tokens": 1, "ended": True},
            }
        )
    )
    rows = {
        "read": 1200,
        "used": 1100,
        "dropped": {"empty_reply": 100},
        "first_rows": {"empty_reply": [7, 9]},
    }
    write_json(run.path / "data_report.json", rows)
    measured = {"value": 0.875, "low": 0.8, "high": 0.925, "num_rows": 1234}
    write_json(
        run.of("eval").report, {"models": {"dpo": {"preference_accuracy": measured, "loss": {"value": 1.5}}}}
    )
    write_json(
        run.of("compare").report, {"models": {"base": {"ended_fraction": 0.25}, "dpo": {"by_source": {}}}}
    )
    page = text_of(run)
    assert "preference_accuracy" not in page and "ended fraction" not in page
    assert "<img" not in page and "&lt;/script&gt;" in page
    for shown in (
        "Ünïcödé",
        "64 tokens · ",
        "no end-of-turn token",
        "(empty)",
        "1,100 of 1,200 rows",
        "a reply of the assistant is empty",
        "rows 7, 9, ...",
        "87.5%",
        "80.0% to 92.5%",
        ">1,234<",
        "accuracy by reward",
        "ended by itself",
        "25.0%",
    ):
        assert shown in page, shown


def test_a_report_of_an_earlier_session_does_not_speak_for_this_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", 5, outcome="running", ended=None)
    write_json(run.report, {"outcome": "interrupted", "num_steps": 3, "wall_seconds": 12.0})
    record = run_record.read(run)
    assert record
    assert (record.outcome, record.report.num_steps, record.report.wall_seconds) == ("killed", 5, None)


def test_a_value_that_is_not_finite_is_counted(tmp_path: Path) -> None:
    assert "1 value was not finite" in text_of(make_run(tmp_path, "sft", 30))


def test_a_last_loss_that_is_no_number_is_not_told_as_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", 0, outcome="failed")
    run.metrics.write_text('{"step": 1, "loss": 4.6678}\n{"step": 20, "loss": null}\n')
    text = text_of(run)
    assert "<dt>Training loss</dt><dd>not finite</dd>" in text and "from 4.6678" in text


def test_a_page_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", 3)
    run.page.mkdir()
    (run.page / "in the way").touch()
    with pytest.raises(UserError, match=r"cannot write .*report.html: "):
        run_page.write(run)


@pytest.mark.parametrize("made", [True, False])
def test_the_script_writes_what_there_is_and_needs_no_torch(tmp_path: Path, made: bool) -> None:
    run = RunDir(tmp_path, "tiny", "sft")
    if made:
        write_json(run.manifest, {"outcome": "running"})
    code = (
        "import sys, runpy; sys.argv = ['run_report.py', '--recipe', 'tiny', '--runs', sys.argv[1]]\n"
        "try: runpy.run_path('run_report.py', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "AssertionError" not in done.stderr
    if made:
        assert done.returncode == 0, done.stderr
        assert str(run.page) in done.stdout
        assert "Killed" in run.page.read_text()
    else:
        assert done.returncode == 2
        assert "nothing to report" in done.stderr and "run_sft.py --recipe tiny" in done.stderr


def test_files_of_another_version_are_said_on_the_page_a_line_each(tmp_path: Path) -> None:
    run, notes = make_run(tmp_path, "sft", 5, gpu_count=2), list[str]()
    write_json(run.report, {"outcome": "finished", "perplexity": HOSTILE, "notes": None})
    write_json(run.of("eval").report, [])
    assert run_page.write(run, notes)
    assert [note.partition(" ")[0] for note in notes] == [
        str(run.manifest),
        str(run.report),
        str(run.of("eval").report),
    ]
    assert "unknown keys: gpu_count" in notes[0] and "unknown keys: perplexity" in notes[1]
    assert all(note in text_of(run) for note in notes)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n",
        b'{"step": "x", "prompt": 3, "before": 4, "after": {"text": 5, "num_tokens": "x"}}\n',
        b'{"prompt": "\\ud800", "before": {"text": "\\ud800"}}\n',
        None,
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "answers.jsonl", "events.jsonl", "report.json"])
def test_whatever_lies_in_place_of_a_file_of_a_run_is_reported_around(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    run = make_run(tmp_path, "sft", 3)
    file = run.path / name
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert run_page.write(run)
