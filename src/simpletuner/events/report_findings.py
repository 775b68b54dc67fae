"""The findings in the report: the verdict, and the loss of each training image."""

from __future__ import annotations

from simpletuner.events.event_types import SampleLossesMeasured
from simpletuner.events.findings import describe_sample_losses, describe_verdict
from simpletuner.events.html_parts import escape_text, render_section, render_table
from simpletuner.events.run_history import RunHistory

MAX_LISTED_IMAGES = 20


def render_findings(history: RunHistory) -> str:
    """Return the section of everything that was found out about the run in words."""
    sentences = []
    if history.verdict is not None:
        sentences.append(describe_verdict(history.verdict))
    trained = history.sample_losses.get("train")
    if trained is not None and trained.resisting:
        sentences.append(describe_sample_losses(trained))
    content = "".join(f"<p>{escape_text(sentence)}.</p>" for sentence in sentences)
    if trained is not None:
        content += _render_images(trained)
    return render_section("Findings", content)


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
