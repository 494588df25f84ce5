"""What is drawn while a stage trains: a state of plain numbers in, something that rich can show out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from toolkit.console.pace import Pace
from toolkit.recipe.stages import PanelField

BLOCKS = "▁▂▃▄▅▆▇█"
NOT_A_NUMBER = "?"
CELL = 22  # columns that a label and its value take
WIDEST = 100
SPARKLINE = 40
CTRL_C = 5  # columns left free: the terminal writes ^C there, twice, and would wrap a full line
MOST_POINTS = 512  # of a curve in memory
# What every stage shows behind its own fields.
COMMON = (
    PanelField("learning_rate", "lr", "{:.2e}"),
    PanelField("grad_norm", "grad norm", "{:.3g}"),
    PanelField("tokens_per_second", "tokens/s", "{:,.0f}"),
    PanelField("vram_gib", "VRAM", "{:.2f} GiB"),
    PanelField("vram_peak_gib", "VRAM peak", "{:.2f} GiB"),
    PanelField("ram_gib", "RAM", "{:.2f} GiB"),
)


class Curve:
    """A number's course over any number of steps in at most MOST_POINTS means of equally many neighbours."""

    def __init__(self, values: Sequence[float] = ()) -> None:
        self._means: list[float] = []
        self._stride, self._sum, self._count = 1, 0.0, 0
        self.first: float | None = None
        self.last: float | None = None
        for value in values:
            self.append(value)

    def append(self, value: float) -> None:
        self.first = value if self.first is None else self.first
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._stride:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == MOST_POINTS:
            self._means = [(a + b) / 2 for a, b in list(pairwise(self._means))[::2]]
            self._stride *= 2

    def points(self) -> list[float]:
        """The means so far, the unfinished one included."""
        return [*self._means, *([self._sum / self._count] if self._count else [])]


def sparkline(values: Sequence[float], width: int) -> str:
    """`width` columns over all values: a block for the mean of each share, lowest to highest; spaces fill the rest.

    Fewer values than columns take one each. A share with a NaN or an infinity is a question mark, a flat line is low.
    """
    num = min(width, len(values))
    shares = [values[i * len(values) // num : (i + 1) * len(values) // num] for i in range(num)]
    means = [sum(share) / len(share) for share in shares]
    known = [mean for mean in means if math.isfinite(mean)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    steps = (len(BLOCKS) - 1) / span if span else 0.0
    blocks = (BLOCKS[round((mean - low) * steps)] if math.isfinite(mean) else NOT_A_NUMBER for mean in means)
    return "".join(blocks).ljust(width)


def duration(seconds: float) -> str:
    """`0.4 s`, `18 s`, `4 min 08 s`, `1 h 12 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


@dataclass
class State:
    """What the panel knows. `fields` are the stage's own, `latest` has the Trainer's names, `curves` those fields'
    labels; `doing` is a title with done and total.
    """

    title: str
    fields: tuple[PanelField, ...]
    num_steps: int
    num_epochs: float | None  # None where the steps are given
    pace: Pace
    step: int = 0
    epoch: float = 0.0
    latest: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    saved_step: int | None = None
    doing: tuple[str, int, int | None] | None = None


def draw(state: State, now: float, width: int, height: int) -> RenderableType:
    """The panel, or one line where the terminal has no room for it."""
    width = min(width - CTRL_C, WIDEST)
    cells = _cells(state, now)
    across = max(1, (width - 4) // CELL)
    curves = [(label, curve) for label, curve in state.curves.items() if curve.points()]
    needed = 3 + math.ceil(len(cells) / across) + len(curves) + 1 + 1
    if width < 2 * CELL or needed > height:
        return _line(state, now, width)
    grid = Table.grid(padding=0)
    for _ in range(across):
        grid.add_column(width=CELL, no_wrap=True)
    for start in range(0, len(cells), across):
        grid.add_row(*cells[start : start + across])
    rows: list[RenderableType] = [_bar(state, width - 4), grid]
    spare = width - 4 - 8 - 22
    rows += [_curve(name, curve, min(SPARKLINE, spare)) for name, curve in curves]
    rows += [_doing(state, width - 4)] if state.doing else []
    return Panel(
        Group(*rows),
        title=f"[bold]{escape(state.title)}[/]",
        title_align="left",
        width=width,
        border_style="dim",
    )


def closing(state: State, now: float, width: int) -> Text:
    """What stays of the panel when training ends: how far it came, and the curve of the loss."""
    done = f"step {state.step:,} of {state.num_steps:,} after {duration(now - state.pace.began)}"
    text = Text.assemble((state.title, "dim"), f"  {done}")
    loss = state.curves.get("loss", Curve())
    if points := loss.points():
        ends = f" {loss.first:.4g} → {loss.last:.4g}"
        room = min(SPARKLINE, width - len(text) - len("  loss ") - len(ends))
        if room >= 3:
            text.append("  loss ", "dim").append(sparkline(points, room).rstrip(), "cyan").append(ends)
    text.truncate(width, overflow="ellipsis")
    return text


def line(
    step: int,
    num_steps: int,
    logs: dict[str, float],
    fields: Sequence[PanelField],
    left: float | None = None,
) -> str:
    """A log of the Trainer as one plain line; "" where it holds nothing to show. `fields` are the stage's own.

    `left` are the seconds that the rest takes, where that is known and there is a rest.
    """
    shown = [f"{one.label} {value}" for one, value in _shown(fields, logs, step)]
    if shown and left:
        shown.append(f"{duration(left)} left")
    held_out = [(one, logs[f"eval_{one.key}"]) for one in fields if f"eval_{one.key}" in logs]
    if held_out:
        shown = ["held-out", *(f"{one.label} {one.style.format(value)}" for one, value in held_out)]
    return f"{step:>{len(str(num_steps))}}/{num_steps}  " + "  ".join(shown) if shown else ""


def _shown(fields: Sequence[PanelField], logs: dict[str, float], step: int) -> list[tuple[PanelField, str]]:
    """Those of the stage's own and the common fields that the log has a value of, and the value."""
    known = (one for one in (*fields, *COMMON) if one.key in logs and step >= one.first_step)
    return [(one, one.style.format(logs[one.key])) for one in known]


def _cells(state: State, now: float) -> list[Text]:
    left = state.pace.remaining_seconds(state.num_steps, now)
    pairs = [
        ("elapsed", duration(now - state.pace.began)),
        ("left", "-" if left is None else duration(left)),
        ("epoch", f"{state.epoch:.2f}" + (f" of {state.num_epochs:g}" if state.num_epochs else "")),
        ("checkpoint", "none yet" if state.saved_step is None else f"step {state.saved_step:,}"),
        *((one.label, value) for one, value in _shown(state.fields, state.latest, state.step)),
    ]
    return [Text.assemble((f"{label} ", "dim"), value) for label, value in pairs]


def _bar(state: State, width: int) -> RenderableType:
    done = f"  step {state.step:,} of {state.num_steps:,}  {state.step / max(1, state.num_steps):.0%}"
    return _beside(ProgressBar(state.num_steps, state.step, width - len(done)), done)


def _doing(state: State, width: int) -> RenderableType:
    assert state.doing is not None
    title, done, total = state.doing
    if total is None:
        return Text(f"{title} ...", style="yellow")
    label, count = f"{title}  ", f"  {done} of {total}"
    return _beside(label, ProgressBar(total, done, min(SPARKLINE, width - len(label) - len(count))), count)


def _curve(name: str, curve: Curve, width: int) -> RenderableType:
    ends = f"  {curve.first:.4g} → {curve.last:.4g}"
    return Text.assemble((f"{name:<8}", "dim"), (sparkline(curve.points(), width), "cyan"), ends)


def _beside(*parts: RenderableType) -> Table:
    grid = Table.grid(padding=0)
    for _ in parts:
        grid.add_column(no_wrap=True)
    grid.add_row(*parts)
    return grid


def _line(state: State, now: float, width: int) -> Text:
    left = state.pace.remaining_seconds(state.num_steps, now)
    parts = [f"{state.title}  {state.step:,}/{state.num_steps:,}"]
    parts += [f"loss {state.latest['loss']:.4f}"] if "loss" in state.latest else []
    parts += [f"{duration(left)} left"] if left is not None else []
    parts += [state.doing[0]] if state.doing else []
    text = Text("  ".join(parts))
    text.truncate(width, overflow="ellipsis")
    return text
