"""The parts that every section of the report is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def render_table(heads: Iterable[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table of texts, which are escaped; empty without rows. kind: a further CSS class."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape_text(name)}</th>' for name in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="plain {kind}"><tr>{head}</tr>{lines}</table></div>'


def render_section(title: str, content: str) -> str:
    """Return a section with HTML content; empty without content."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def escape_text(text: str) -> str:
    """Escape the text for HTML; a stray byte of a file name becomes a question mark."""
    return escape(text.encode("utf-8", "replace").decode())
