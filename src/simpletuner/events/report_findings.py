"""The findings in the report: the verdict, and the loss of each training image."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.events.charts import ChartLine, render_line_chart
from simpletuner.events.event_types import SampleLossesMeasured, WeightChangeMeasured
from simpletuner.events.findings import (
    describe_caption_fit,
    describe_knowledge,
    describe_sample_losses,
    describe_verdict,
    describe_weight_change,
)
from simpletuner.events.html_parts import escape_text, render_section, render_table
from simpletuner.events.run_history import RunHistory

MAX_LISTED_IMAGES = 20


def render_findings(history: RunHistory) -> str:
    """Return the section of everything that was found out about the run in words."""
    sentences = []
    if history.verdict is not None:
        sentences.append(describe_verdict(history.verdict))
    changes = [history.weight_changes[step] for step in sorted(history.weight_changes)]
    if changes:
        sentences.append(describe_weight_change(changes[-1]))
    sentences += map(describe_knowledge, history.knowledge.values())
    if history.caption_fit is not None and history.caption_fit.unfit:
        sentences.append(describe_caption_fit(history.caption_fit))
    trained = history.sample_losses.get("train")
    if trained is not None and trained.resisting:
        sentences.append(describe_sample_losses(trained))
    content = "".join(f"<p>{escape_text(sentence)}.</p>" for sentence in sentences)
    if changes:
        content += _render_changes(changes)
    if trained is not None:
        content += _render_images(trained)
    return render_section("Findings", content)


def _render_changes(changes: Sequence[WeightChangeMeasured]) -> str:
    """Return the change of all weights over the steps, and that of each block at the end."""
    points = [(float(event.step), 100 * event.total) for event in changes]
    chart = render_line_chart(
        "Change of the weights, % of their norm", [ChartLine(points, markers=True)], zero=True
    )
    rows = [(name, f"{value:.3%}") for name, value in changes[-1].blocks.items()]
    table = render_table(("block", f"change at step {changes[-1].step}"), rows)
    details = f"<details><summary>change of each block</summary>{table}</details>"
    return f'<div class="charts">{chart}</div>{details}'


def _render_images(event: SampleLossesMeasured) -> str:
    """Return the images whose loss fell least, in a part that can be opened."""
    ratios = sorted(
        (
            (after / before if before else 1.0, name)
            for name, (before, after) in event.losses.items()
        ),
        reverse=True,
    )
    rows = [
        (name, *(f"{loss:.4f}" for loss in event.losses[name]), f"{ratio:.3f}",
         "resists" if name in event.resisting else "")
        for ratio, name in ratios[:MAX_LISTED_IMAGES]
    ]  # fmt: skip
    table = render_table(("training image", "loss before", "after", "ratio", ""), rows)
    count = len(event.losses)
    summary = f"loss of {count} training images on fixed noise, the least learnt first"
    return f"<details><summary>{escape_text(summary)}</summary>{table}</details>" if rows else ""
