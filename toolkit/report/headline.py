"""The top of a run's report: how it ended and why, what the same command would do now, the figures asked for first."""

from __future__ import annotations

from html import escape

from toolkit.console.panel import duration
from toolkit.recipe import stages
from toolkit.report.run_record import RunRecord, moment
from toolkit.report.tables import number


def headline(record: RunRecord) -> str:
    """What ran, how it ended and why, when and on what, and what the same command would do now."""
    manifest, reason = record.manifest, record.report.reason
    if record.outcome == "killed":
        reason = "The process ended without a word: it was killed, by hand or for memory, or the machine went down."
    said = f'<p class="reason">{escape(str(reason))}</p>' if reason else ""
    command = f"<code>python {escape(manifest.command or '')}</code>"
    return (
        f"<h1>{stages.of(record.run.name).title} of {escape(record.run.recipe)}{_label(record)}</h1>"
        f'<p class="quiet">{escape(_when(record))} · {escape(_device(record))}</p>'
        f'<div class="outcome {record.outcome}"><p><b>{record.outcome.capitalize()}</b> {escape(_how_far(record))}</p>'
        f'{said}<p class="quiet">{escape(_next(record))}<br>{command}</p></div>'
    )


def _label(record: RunRecord) -> str:
    label = stages.label_of(record.run.name)
    return f": {escape(label)}" if label else ""


def _how_far(record: RunRecord) -> str:
    report = record.report
    steps, total = report.num_steps or 0, record.total_steps
    done = f"{steps:,} of {total:,} steps" if total and total != steps else f"{steps:,} steps"
    if record.outcome == "finished":
        return f"after {done}" + (f" in {duration(report.wall_seconds)}" if report.wall_seconds else "")
    return f"with {done} logged" if steps else "before the first step was logged"


def _next(record: RunRecord) -> str:
    """What the same command does with what is there."""
    if record.outcome == "finished":
        return "The same command only says so now; with --fresh it moves this run aside and starts again."
    if record.outcome == "running":
        return "This page shows the run as it was when the page was written."
    first = "Once the reason is fixed, the same" if record.outcome == "failed" else "The same"
    if record.sealed_step is None:
        return f"{first} command starts from the first step: no checkpoint was finished."
    of_total = f" of {record.total_steps:,}" if record.total_steps else ""
    return f"{first} command continues at step {record.sealed_step:,}{of_total}."


def _when(record: RunRecord) -> str:
    started, ended = moment(record.manifest.started), moment(record.manifest.ended)
    if ended is None:
        ended, last = record.last_sign, ", the last sign of life"
    else:
        last = ""
    if started is None or ended is None:
        return "at an unknown time"
    same_day = started.date() == ended.date()
    end = f"{ended:%H:%M}" if same_day else f"{ended.day} {ended:%b %Y, %H:%M}"
    resumed = len(record.manifest.resumed_at_steps or [])
    sessions = f", continued {resumed} time{'s' * (resumed != 1)}" if resumed else ""
    return f"{started.day} {started:%b %Y, %H:%M} to {end} UTC{last}{sessions}"


def _device(record: RunRecord) -> str:
    gpu, cores = record.manifest.gpu, record.manifest.cpu_count
    if gpu:
        return f"{gpu.name}, {number(gpu.gib, '{:.0f}')} GiB, driver {gpu.driver}"
    return f"CPU, {cores} cores" if cores else "CPU"


def tiles(record: RunRecord) -> str:
    """The figures that are asked for first; what is not known is left out."""
    report, evaluated = record.report, record.report.eval or {}
    tokens, seconds = report.train_tokens, report.train_seconds
    planned, peak = report.planned_peak_gib, report.measured_peak_gib
    first = number(report.loss_first, "from {:.4f}")
    logged = record.series["loss"].values if "loss" in record.series else []
    is_lost = bool(logged) and logged[-1] is None
    session = "since it was continued" if record.manifest.resumed_from else "of the steps alone"
    rewarded = report.reward_learning is not None  # there a loss says nothing
    reward = (report.reward_learning or {}).get("reward") or {}
    tiles = [
        ("Reward", number(reward.get("last"), "{:.3f}"), number(reward.get("first"), "from {:.3f}")),
        ("Training loss", number(report.loss_last, "{:.4f}") or ("not finite" if is_lost else None), first),
        ("Evaluation loss", number(evaluated.get("loss"), "{:.4f}"), "held-out rows"),
        ("Reward margin", number(evaluated.get("rewards/margins"), "{:.3f}"), "held-out pairs"),
        ("Reward accuracy", number(evaluated.get("rewards/accuracies"), "{:.1%}"), "held-out pairs"),
        ("Held-out reward", number(evaluated.get("reward"), "{:.3f}"), "sampled completions"),
        ("Held-out right", number(evaluated.get("correct"), "{:.1%}"), "sampled completions"),
        ("Accuracy of scores", number(evaluated.get("accuracy"), "{:.1%}"), "held-out pairs"),
        ("Margin of scores", number(evaluated.get("margin"), "{:.3f}"), "held-out pairs"),
        ("Tokens", number(tokens, "{:,}"), number(tokens / seconds, "{:,.0f} a second") if tokens and seconds else ""),
        ("Training time", duration(seconds) if seconds else None, session),
        ("Peak GPU memory", number(peak, "{:.2f} GiB"), number(planned, "planned {:.2f} GiB")),
    ]  # fmt: skip
    shown = "".join(
        f'<div><dt>{label}</dt><dd>{value}</dd><dd class="quiet">{about or "&nbsp;"}</dd></div>'
        for label, value, about in tiles
        if value and not (rewarded and label.endswith(" loss"))
    )
    said = [*(report.notes or []), *record.notes]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in said)
    return (f'<dl class="tiles">{shown}</dl>' if shown else "") + notes
