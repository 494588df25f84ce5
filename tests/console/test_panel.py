"""What is drawn: known answers for curve, times and layout."""

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolkit.console import panel
from toolkit.console.pace import Pace
from toolkit.console.panel import Curve, State, duration, sparkline
from toolkit.recipe import stages

FIELDS = stages.of("dpo").panel_fields


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 3, "   "),
        ([5.0], 3, "▁  "),
        ([2, 2, 2], 3, "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 4, "█▁  "),
        ([0, 0, 7, 7, 0, 0, 7, 7], 4, "▁█▁█"),  # means of two
        ([0, math.nan, 7], 3, "▁?█"),
        ([math.inf, math.nan], 2, "??"),
        ([1, 2], 0, ""),
    ],
)
def test_a_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(0, 60))
def test_a_sparkline_has_its_width_and_every_value_counts(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == width and len(line.rstrip()) == min(width, len(values))


@given(st.integers(1, 5000))
def test_a_curve_keeps_the_whole_run_in_bounded_memory(num: int) -> None:
    curve = Curve([float(i) for i in range(num)])
    points = curve.points()
    assert len(points) <= panel.MOST_POINTS and (curve.first, curve.last) == (0, num - 1)
    assert points == sorted(points) and points[0] < num / 4 + 1 and points[-1] >= num * 3 / 4 - 1
    if num < panel.MOST_POINTS:
        assert points == list(range(num))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (248, "4 min 08 s"),
        (4320, "1 h 12 min"),
    ],
)
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def trained(stage: str = "dpo") -> State:
    state = State(
        f"{stage} · llama31_8b",
        stages.of(stage).panel_fields,
        1500,
        1.0,
        Pace(0, 0.0),
        step=480,
        epoch=0.32,
        saved_step=450,
    )
    for step in (1, 2, 480):
        state.pace.reached(step, float(step))
    state.latest = {
        "loss": 0.5321,
        "learning_rate": 4e-6,
        "grad_norm": 1.234,
        "tokens_per_second": 2413.2,
        "vram_gib": 15.21,
        "vram_peak_gib": 18.5,
    }
    state.curves["loss"] = Curve([0.69, 0.6, 0.55])
    if stage == "dpo":
        state.latest |= {"rewards/margins": 0.41, "rewards/accuracies": 0.75}
        state.curves["margin"] = Curve([0.0, 0.2, 0.41])
    return state


def drawn(state: State, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(panel.draw(state, 480.0, width, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 20), (52, 40), (250, 60)])
def test_the_panel_says_everything_on_any_terminal_that_has_room(width: int, height: int) -> None:
    lines = drawn(trained(), width, height)
    text = "\n".join(lines)
    for said in (
        "dpo · llama31_8b", "480 of 1,500", "32%", "elapsed 8 min 00 s", "left 17 min 00 s", "epoch 0.32 of 1",
        "checkpoint step 450", "loss 0.5321", "lr 4.00e-06", "grad norm 1.23", "tokens/s 2,413", "VRAM 15.21 GiB",
        "VRAM peak 18.50 GiB", "margin 0.410", "accuracy 75%", "█▃▁", "▁▄█",
    ):  # fmt: skip
        assert said in text, said
    assert max(map(len, lines)) <= width - panel.CTRL_C and len(lines) <= height


@pytest.mark.parametrize(("width", "height"), [(100, 6), (40, 20), (12, 3)])
def test_a_terminal_without_room_gets_one_line(width: int, height: int) -> None:
    [line] = drawn(trained(), width, height)
    assert line.startswith("dpo · l"[: width - panel.CTRL_C - 1]) and len(line) <= width - panel.CTRL_C


def test_an_evaluation_has_a_bar_in_the_panel() -> None:
    state = trained("sft")
    state.doing = ("evaluating", 3, 10)
    assert any("evaluating  ━" in line and "3 of 10" in line for line in drawn(state, 60, 20))
    state.doing = ("evaluating", 3, None)
    assert any("evaluating ..." in line for line in drawn(state, 60, 20))


def test_nothing_is_known_before_the_first_step() -> None:
    text = "\n".join(drawn(State("sft · tiny", FIELDS, 149, 1.5, Pace(0, 480.0)), 80, 24))
    assert "step 0 of 149  0%" in text and "left -" in text and "checkpoint none yet" in text


def test_a_plain_line_of_an_interval_and_of_an_evaluation() -> None:
    assert (
        panel.line(20, 1500, {"loss": 0.5, "learning_rate": 1e-4}, FIELDS)
        == "  20/1500  loss 0.5000  lr 1.00e-04"
    )
    assert (
        panel.line(20, 149, {"eval_loss": 0.5, "eval_runtime": 1.0}, FIELDS)
        == " 20/149  held-out  loss 0.5000"
    )
    assert panel.line(20, 149, {"train_runtime": 3.0}, FIELDS) == ""
    assert panel.line(20, 149, {"loss": 0.5}, FIELDS, left=200.0) == " 20/149  loss 0.5000  3 min 20 s left"
    assert panel.line(149, 149, {"loss": 0.5}, FIELDS, left=0.0) == "149/149  loss 0.5000"


def test_the_first_step_of_dpo_shows_no_accuracy_of_ties() -> None:
    logs = {"loss": 0.6931, "rewards/margins": 0.0, "rewards/accuracies": 0.125}
    assert panel.line(1, 80, logs, FIELDS) == " 1/80  loss 0.6931  margin 0.000"
    assert "accuracy 12%" in panel.line(2, 80, logs, FIELDS)


@pytest.mark.parametrize("width", [100, 60, 30])
def test_what_stays_of_the_panel_is_one_line(width: int) -> None:
    text = panel.closing(trained(), 480.0, width).plain
    assert text.startswith("dpo · llama31_8b  step 480") and len(text) <= width
    assert ("█▃▁ 0.69 → 0.55" in text) == (width == 100)
