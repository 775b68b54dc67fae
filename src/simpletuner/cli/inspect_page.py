"""One self-contained HTML page about datasets: findings, contact sheet, captions, copies."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_statistics import CaptionStatistics, TextCount
from simpletuner.data.dataset_findings import Finding
from simpletuner.data.pixels import load_upright
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.statistics import DatasetStatistics, MeasuredImage
from simpletuner.errors import storage_error
from simpletuner.events import html_report
from simpletuner.events.formatting import count_of, pick_evenly

THUMBNAIL_PX = 160
# Every image of the page is a part of the file, so each list is bounded.
MAX_SHEET_BUCKETS = 12
MAX_SHEET_IMAGES = 72
MAX_GROUPS = 12
MAX_IMAGES_OF_GROUP = 4
MAX_FLAGGED = 12
MAX_TEXTS = 20


class _Thumbnails:
    """Thumbnails as parts of the page, each decoded once; with the crop drawn over it."""

    def __init__(self, placed: Sequence[BucketedSample], options: DataOptions) -> None:
        self._placed = {item.sample.id: item for item in placed}
        self._options = options
        self._sources: dict[str, str] = {}

    def render(self, sample_id: str, note: str = "", crop: bool = False) -> str:
        """Return a figure. note: under the image. crop: mark what is trained on."""
        item = self._placed[sample_id]
        source = self._source(item)
        if not source:
            return f"<figure><figcaption>{_escape(sample_id)}: not readable</figcaption></figure>"
        window = _crop_window(item) if crop else ""
        image = f'<img src="{source}" alt="{_escape(sample_id)}">'
        under = "<br>".join(filter(None, (_escape(note), _escape(sample_id))))
        title = _escape(" | ".join(item.sample.captions))
        return (
            f'<figure title="{title}"><div class="frame">{image}{window}</div>'
            f"<figcaption>{under}</figcaption></figure>"
        )

    def _source(self, item: BucketedSample) -> str:
        name = item.sample.id
        if name not in self._sources:
            try:
                small = load_upright(item.sample, self._options, (THUMBNAIL_PX, THUMBNAIL_PX))
            except UnusableFile:
                self._sources[name] = ""
                return ""
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=75)
            data = base64.b64encode(buffer.getvalue()).decode()
            self._sources[name] = f"data:image/webp;base64,{data}"
        return self._sources[name]


def write_page(
    path: Path,
    statistics: DatasetStatistics,
    findings: Sequence[Finding],
    placed: Sequence[BucketedSample],
    options: DataOptions,
) -> Path:
    """Write the page, replacing an existing file, and return its absolute path.

    It holds its images, and a browser fetches nothing for it. Raises DiskFull or StorageError where
    it cannot be written.
    """
    thumbnails = _Thumbnails(placed, options)
    style = Path(html_report.__file__).with_name("report.css").read_text("utf-8")
    style += Path(__file__).with_name("inspect_page.css").read_text("utf-8")
    names = ", ".join(facts.id for facts in statistics.datasets)
    body = "".join(
        (
            _render_header(statistics, names),
            _section("Findings", _render_findings(findings)),
            _section("Datasets", _render_datasets(statistics)),
            _section("Contact sheet", _render_sheet(statistics, placed, thumbnails)),
            _section("Captions", _render_captions(statistics.captions)),
            _section("Copies", _render_groups(statistics, thumbnails)),
            _section(
                "Enlarged for training", _render_flagged(statistics.enlarged, thumbnails, "x")
            ),
            _section("Blurred", _render_flagged(statistics.blurred, thumbnails, " px of blur")),
            _section("Files that cannot be used", _render_rejected(statistics)),
            _section("Notes of the scan", _render_notes(statistics.notes)),
        )
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_escape(names)} · simpletuner inspect</title>"
        '<meta http-equiv="Content-Security-Policy" '
        f'content="{html_report.CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body>{body}</body></html>"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise storage_error(f"{path} cannot be written", error) from error
    return path.absolute()


def _crop_window(item: BucketedSample) -> str:
    """Return the mark over the part of the image that is trained on, in per cent of its size."""
    left, top = item.crop_px
    values = (
        ("left", left / item.resize_px[0]),
        ("top", top / item.resize_px[1]),
        ("width", item.bucket_px[0] / item.resize_px[0]),
        ("height", item.bucket_px[1] / item.resize_px[1]),
    )
    return f'<i style="{";".join(f"{name}:{value:.2%}" for name, value in values)}"></i>'


def _render_header(statistics: DatasetStatistics, names: str) -> str:
    width, height = statistics.sizes.median_px
    tokens = statistics.captions.tokens
    facts = [
        ("images", str(statistics.images)),
        ("buckets", str(len(statistics.buckets))),
        ("median size", f"{width} x {height}"),
        ("median caption", f"{tokens.median:g} tokens"),
    ]
    passes = [facts.passes for facts in statistics.datasets if facts.passes is not None]
    if passes and statistics.steps is not None:
        least, most = min(passes), max(passes)
        range_text = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        facts += [("steps", str(statistics.steps)), ("passes per image", range_text)]
    items = "".join(
        f'<li><span class="soft">{name}</span><b>{_escape(text)}</b></li>' for name, text in facts
    )
    return f'<header><h1>{_escape(names)}</h1><ul class="facts">{items}</ul></header>'


def _render_findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>Nothing to warn of.</p>"
    items = []
    for finding in findings:
        images = ""
        if finding.sample_ids:
            listed = _escape(", ".join(finding.sample_ids))
            images = f'<span class="soft">{listed}</span>'
        items.append(
            f'<li class="{finding.level}"><b>{_escape(finding.message)}</b>'
            f"{_escape(finding.advice)} {images}</li>"
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _render_datasets(statistics: DatasetStatistics) -> str:
    rows = [
        (
            facts.id,
            facts.dataset_type,
            str(facts.images),
            str(sum(facts.rejected.values())),
            "" if facts.passes is None else f"{facts.passes:g}",
        )
        for facts in statistics.datasets
    ]
    return _table(("dataset", "type", "images", "rejected", "passes per image"), rows)


def _render_sheet(
    statistics: DatasetStatistics, placed: Sequence[BucketedSample], thumbnails: _Thumbnails
) -> str:
    by_bucket: dict[tuple[int, int], list[str]] = defaultdict(list)
    for item in placed:
        by_bucket[item.bucket_px].append(item.sample.id)
    shown = statistics.buckets[:MAX_SHEET_BUCKETS]
    each = max(2, MAX_SHEET_IMAGES // max(1, len(shown)))
    parts = ['<p class="soft">What is outside the frame is cropped away.</p>']
    for bucket in shown:
        names = by_bucket[bucket.width_px, bucket.height_px]
        chosen = [names[at] for at in pick_evenly(range(len(names)), each)]
        crop = f", {bucket.cropped:.1%} cropped away" if bucket.cropped >= 0.001 else ""
        figures = "".join(thumbnails.render(name, crop=True) for name in chosen)
        parts.append(
            f"<h3>{bucket.width_px} x {bucket.height_px}: {count_of(bucket.images, 'image')}"
            f'{crop}</h3><div class="sheet">{figures}</div>'
        )
    if len(statistics.buckets) > len(shown):
        rest = statistics.buckets[len(shown) :]
        rows = [(f"{item.width_px} x {item.height_px}", str(item.images)) for item in rest]
        parts.append(_table(("other buckets", "images"), rows))
    return "".join(parts)


def _render_captions(captions: CaptionStatistics) -> str:
    if not captions.captions:
        return "<p>No image has a caption.</p>"
    rows = [
        (name, str(item.shortest), f"{item.median:g}", str(item.longest))
        for name, item in (("words", captions.lengths), ("tokens", captions.tokens))
    ]
    over = captions.tokens.over_limit
    note = f"Tokens are {captions.token_source}; the limit is {captions.token_limit}."
    note += f" {count_of(over, 'caption')} above it." if over else ""
    parts = [_table(("length", "shortest", "median", "longest"), rows)]
    parts.append(f'<p class="soft">{_escape(note)}</p>')
    if captions.trigger is not None:
        parts.append(
            f"<p>{_escape(repr(captions.trigger.trigger))} is in the captions of "
            f"{captions.trigger.images} of {count_of(captions.images, 'image')}.</p>"
        )
    lists = (
        ("in nearly every caption", captions.constant_phrases),
        ("frequent tags", captions.tags),
        ("frequent phrases", captions.phrases),
    )
    bars = "".join(_bars(title, counts, captions.captions) for title, counts in lists)
    parts.append(f'<div class="columns">{bars}</div>')
    equal = [
        (item.text, str(item.images), ", ".join(item.sample_ids))
        for item in captions.equal_captions[:MAX_TEXTS]
    ]
    parts.append(_table(("captions of several images", "images", "such as"), equal))
    return "".join(parts)


def _bars(title: str, counts: Sequence[TextCount], total: int) -> str:
    if not counts:
        return ""
    rows = "".join(
        f"<tr><td>{_escape(item.text)}</td><td>{item.captions}</td>"
        f'<td><s style="width:{item.captions / total:.1%}"></s></td></tr>'
        for item in counts[:MAX_TEXTS]
    )
    return (
        f'<div><h3>{title}</h3><div class="scroll"><table class="plain bars">{rows}'
        "</table></div></div>"
    )


def _render_groups(statistics: DatasetStatistics, thumbnails: _Thumbnails) -> str:
    parts = []
    for title, count, groups in (
        ("the same file", statistics.identical_count, statistics.identical),
        ("nearly the same image", statistics.near_count, statistics.near),
    ):
        if not groups:
            continue
        shown = groups[:MAX_GROUPS]
        more = f", {len(shown)} shown" if len(shown) < count else ""
        parts.append(f"<h3>{title}: {count_of(count, 'group')}{more}</h3>")
        for group in shown:
            figures = "".join(thumbnails.render(name) for name in group[:MAX_IMAGES_OF_GROUP])
            rest = len(group) - MAX_IMAGES_OF_GROUP
            figures += f"<p>and {rest} more</p>" if rest > 0 else ""
            parts.append(f'<div class="group">{figures}</div>')
    return "".join(parts)


def _render_flagged(images: Sequence[MeasuredImage], thumbnails: _Thumbnails, unit: str) -> str:
    if not images:
        return ""
    figures = "".join(
        thumbnails.render(image.sample_id, f"{image.value:.1f}{unit}")
        for image in images[:MAX_FLAGGED]
    )
    rest = len(images) - MAX_FLAGGED
    more = f'<p class="soft">The first {MAX_FLAGGED}.</p>' if rest > 0 else ""
    return f'<div class="sheet">{figures}</div>{more}'


def _render_rejected(statistics: DatasetStatistics) -> str:
    rows = [(f"{file.dataset}/{file.path}", file.detail) for file in statistics.rejected]
    more = ""
    if statistics.rejected_count > len(rows):
        more = f"<p>The first {len(rows)} of {statistics.rejected_count}.</p>"
    return _table(("file", "reason"), rows) + more


def _render_notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="plain"><tr>{head}</tr>{lines}</table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _escape(text: str) -> str:
    """Escape the text for HTML; a stray byte of a file name becomes a question mark."""
    return escape(text.encode("utf-8", "replace").decode())
