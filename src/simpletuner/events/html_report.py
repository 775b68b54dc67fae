"""The report `report.html`: one page that needs no server, no network and no script."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.events.charts import ChartLine, render_line_chart
from simpletuner.events.event_types import ImageSaved, LossEvaluated, RunFailed, ScoresComputed
from simpletuner.events.formatting import (
    SmoothedMean,
    describe_event,
    format_duration,
    format_score,
    format_world,
    pick_evenly,
)
from simpletuner.events.html_parts import escape_text, render_section, render_table
from simpletuner.events.report_findings import render_findings
from simpletuner.events.run_history import ImageKey, RunHistory, read_run_history
from simpletuner.image_decoding import UndecodableImage, decoder_errors

MAX_COLUMNS = 9  # steps of the images that are shown: the first, the last and some between
THUMBNAIL_PX = 448
ImageColumn = tuple[int, str]  # step and "", or step and "strength 0.5"
SERIES_STYLES = ("line", "second", "third")
# The browser must fetch nothing at all, whatever a caption or a file name may contain.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into a run folder, from events.jsonl, config.json and the images.

    defaults: with it, settings that differ from it are shown first. The file is replaced
    atomically, so that it can be rewritten while it is read.
    """
    history = read_run_history(run_dir)
    title = f"{run_dir.resolve().name} · simpletuner"
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    body = "".join(
        [
            _render_header(run_dir, history),
            _render_training(history),
            render_findings(history),
            _render_held_out(history),
            _render_scores(history),
            _render_images(run_dir, history),
            _render_warnings(history),
            _render_settings(run_dir, defaults),
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape_text(title)}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head>"
        f"<body>{body}<footer>Written {_format_time(time.time())}.</footer></body></html>"
    )
    path = run_dir / "report.html"
    write_atomically(path, page)
    return path


def _render_header(run_dir: Path, history: RunHistory) -> str:
    started, steps = history.start_event, list(history.steps.values())
    line, targets = "no run recorded yet", ""
    if started:
        line = f"{started.model} on {started.device}, simpletuner {started.version}"
        line += f"; {format_world(started.world)}" if started.world else ""
        targets = "".join(f"<p>{escape_text(text)}</p>" for text in started.targets)
    facts: list[tuple[str, str]] = []
    if steps:
        smooth = SmoothedMean()
        loss = [smooth(step.loss) for step in steps][-1]
        pace = sum(step.seconds for step in steps) / len(steps)
        facts = [
            ("step", f"{steps[-1].step} of {steps[-1].total}"),
            ("smoothed loss", f"{loss:.4f}"),
            ("per step", format_duration(pace)),
            ("time in steps", format_duration(pace * len(steps))),
        ]
        memory = [step.memory_gib for step in steps if step.memory_gib is not None]
        facts += [("peak memory", f"{max(memory):.1f} GiB")] if memory else []
    held_out = [event for event in history.evaluations.values() if event.best and event.step > 0]
    if held_out:
        best = max(held_out, key=lambda event: event.step)
        facts.append(("best held-out", f"{best.change:+.4f} ± {best.change_se:.4f} at {best.step}"))
    status = (
        "no end recorded yet" if history.end_event is None else describe_event(history.end_event)
    )
    style = "failed" if isinstance(history.end_event, RunFailed) else "soft"
    items = "".join(
        f'<li><span class="soft">{name}</span><b>{escape_text(text)}</b></li>'
        for name, text in facts
    )
    return (
        f"<header><h1>{escape_text(run_dir.resolve().name)}</h1><p>{escape_text(line)}</p>"
        f"{targets}"
        f'<p class="{style}">{escape_text(status)}, '
        f"last event {_format_time(history.last_event_time)}</p>"
        f'<ul class="facts">{items}</ul></header>'
    )


def _render_training(history: RunHistory) -> str:
    steps = [history.steps[step] for step in sorted(history.steps)]
    smooth = SmoothedMean()
    raw = [(float(step.step), step.loss) for step in steps]
    charts = [
        render_line_chart(
            "Loss",
            [
                ChartLine(raw, "each step", "raw"),
                ChartLine([(x, smooth(y)) for x, y in raw], "smoothed"),
            ],
        ),
        render_line_chart(
            "Learning rate", [ChartLine([(float(step.step), step.learning_rate) for step in steps])]
        ),
        render_line_chart(
            "Gradient norm",
            [ChartLine([(float(step.step), step.grad_norm) for step in steps], "", "second")],
        ),
    ]
    return render_section(
        "Training", f'<div class="charts three">{"".join(charts)}</div>' if steps else ""
    )


def _render_held_out(history: RunHistory) -> str:
    series: dict[tuple[str, str], list[LossEvaluated]] = {}
    for event in sorted(history.evaluations.values(), key=lambda event: event.step):
        series.setdefault((event.split, event.dataset), []).append(event)
    losses, changes, by_sigma = [], [], []
    for number, ((split, dataset), events) in enumerate(series.items()):
        name, style = f"{split} ({dataset})", SERIES_STYLES[number % len(SERIES_STYLES)]
        best = max((at for at, event in enumerate(events) if event.best), default=None)
        at = [float(event.step) for event in events]
        losses.append(
            ChartLine(
                list(zip(at, [e.loss for e in events])),
                name,
                style,
                markers=True,
                highlighted_index=best,
            )
        )
        points = list(zip(at, [event.change for event in events]))
        errors = [event.change_se for event in events]
        changes.append(ChartLine(points, name, style, errors, markers=True, highlighted_index=best))
        shown = sorted({0, len(events) - 1 if best is None else best, len(events) - 1})
        curves = [
            ChartLine(
                events[index].by_sigma,
                f"step {events[index].step}",
                SERIES_STYLES[place],
                markers=True,
            )
            for place, index in enumerate(shown)
        ]
        by_sigma.append(
            render_line_chart(
                f"Loss by noise level: {name}", curves, x_name="sigma (1 is pure noise)"
            )
        )
    charts = [
        render_line_chart("Held-out loss", losses),
        render_line_chart("Change since step 0, ± standard error", changes, zero=True),
    ]
    return render_section(
        "Held-out loss", f'<div class="charts">{"".join(charts + by_sigma)}</div>' if series else ""
    )


def _render_scores(history: RunHistory) -> str:
    """Render a table per metric: the rates, with a column per step."""
    metrics: dict[str, list[ScoresComputed]] = {}
    for event in sorted(history.scores.values(), key=lambda event: event.step):
        metrics.setdefault(event.metric, []).append(event)
    tables = []
    for metric, events in metrics.items():
        shown = [events[at] for at in pick_evenly(range(len(events)), MAX_COLUMNS)]
        when = [_step_heading(event.step, event.weights == "base") for event in shown]
        names = dict.fromkeys(name for event in shown for name in event.rates)
        rows = [(name, *(_format_cell(event, name) for event in shown)) for name in names]
        tables.append(render_table((f"{metric}, {shown[-1].prompts} prompts", *when), rows))
    return render_section("Scores on unseen prompts", "".join(tables))


def _format_cell(event: ScoresComputed, name: str) -> str:
    """Return one value of the table of scores; empty where the step has none."""
    if name not in event.rates:
        return ""
    value, error, _ = event.rates[name]
    return format_score(value, error, event.unit)


def _render_images(run_dir: Path, history: RunHistory) -> str:
    rows = _image_rows(history)
    columns = sorted({column for row in rows.values() for column in row})
    steps = [column for column in columns if not column[1]]
    strengths = [column for column in columns if column[1]]
    shown = [*(steps[at] for at in pick_evenly(range(len(steps)), MAX_COLUMNS)), *strengths]
    bases = {
        column[0]
        for row in rows.values()
        for column, event in row.items()
        if event.weights == "base"
    }
    heads = "".join(
        f'<th scope="col">{escape_text(strength) or _step_heading(step, step in bases)}</th>'
        for step, strength in shown
    )
    lines = []
    for (_, width, height, seed, kind), row in sorted(
        rows.items(), key=lambda row: (row[0][:4], row[0][4] != "trained")
    ):
        event = next(iter(row.values()))
        which = " · EMA" if kind == "ema" else ""
        about = f'<span class="soft">{width} x {height} · seed {seed}{escape_text(which)}</span>'
        cells = "".join(
            f"<td>{_render_thumbnail(run_dir, row[column]) if column in row else ''}</td>"
            for column in shown
        )
        lines.append(
            f'<tr><th scope="row">{escape_text(event.prompt) or "(empty prompt)"}<br>{about}</th>'
            f"{cells}</tr>"
        )
    start = f'<div class="scroll"><table class="pictures" style="--columns: {len(shown)}">'
    table = f"{start}<tr><th></th>{heads}</tr>{''.join(lines)}</table></div>"
    note = (
        f'<p class="soft">{MAX_COLUMNS} of {len(steps)} steps</p>'
        if len(steps) > MAX_COLUMNS
        else ""
    )
    return render_section("Validation images", note + table if rows else "")


def _image_rows(history: RunHistory) -> dict[ImageKey, dict[ImageColumn, ImageSaved]]:
    """Return a row per prompt, size, seed and kind of weights: its columns with their images.

    The image of the base model comes first in each row of its prompt; images of the LoRA at other
    strengths are further columns of the row of the trained weights, not rows of their own.
    """
    kinds = {key[4] for key, _ in history.images} & {"ema"} | {"trained"}
    rows: dict[ImageKey, dict[ImageColumn, ImageSaved]] = {}
    for ((prompt, width, height, seed, weights), step), event in history.images.items():
        strength = weights if weights not in ("base", "trained", "ema") else ""
        row_kinds = kinds if weights == "base" else {"trained" if strength else weights}
        for kind in row_kinds:
            row = rows.setdefault((prompt, width, height, seed, kind), {})
            row[step, strength] = event
    return rows


def _render_thumbnail(run_dir: Path, event: ImageSaved) -> str:
    """Render a thumbnail inside the page, linked to the full image in the run folder."""
    path = run_dir / event.path
    if not path.resolve().is_relative_to(run_dir.resolve()):
        return '<span class="soft">outside the run folder</span>'
    try:
        with decoder_errors(), Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    except UndecodableImage:
        return '<span class="soft">missing</span>'
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=86)
    data = base64.b64encode(buffer.getvalue()).decode()
    about = escape_text(f"{event.prompt} (step {event.step}, seed {event.seed})")
    source = f"data:image/webp;base64,{data}"
    return f'<a href="{quote(event.path)}"><img src="{source}" alt="{about}" title="{about}"></a>'


def _render_warnings(history: RunHistory) -> str:
    rows = [(_format_time(t), describe_event(event)) for t, event in history.warnings]
    if history.resume_steps:
        rows.append(
            ("", f"resumed from a checkpoint at step {', '.join(map(str, history.resume_steps))}")
        )
    return render_section("Warnings and restarts", render_table(("when", "what"), rows))


def _render_settings(run_dir: Path, defaults: Mapping[str, Any] | None) -> str:
    path = run_dir / "config.json"
    if not path.exists():
        return ""
    try:
        config = json.loads(read_bounded_text(path))
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(config, dict):
        return ""
    known = defaults or {}
    differs = [key for key, value in config.items() if key in known and value != known[key]]
    changed = [(key, _format_value(config[key]), _format_value(known[key])) for key in differs]
    others = [(key, _format_value(value)) for key, value in config.items() if key not in differs]
    rest = render_table(("option", "value"), others, "settings")
    if not changed:
        return render_section("Settings", rest)
    summary = f"<details><summary>{len(others)} more at their defaults</summary>{rest}</details>"
    return render_section(
        "Settings that differ from the defaults",
        render_table(("option", "value", "default"), changed, "settings") + summary,
    )


def _step_heading(step: int, base: bool) -> str:
    return "before" if base else f"step {step}"


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _format_time(t: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) if t else "never"
