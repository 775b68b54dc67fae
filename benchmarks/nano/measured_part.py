"""The part of a page that a table of results fills, between two marks."""

from __future__ import annotations

END_MARK = "<!-- end of what was measured -->"


def begin_mark(command: str) -> str:
    return f"<!-- measured: {command} -->"


def replace_measured_part(page: str, command: str, measured: str) -> str:
    """Return the page with the text after the command's mark. Raises ValueError without the marks."""
    mark = begin_mark(command)
    before, begin, rest = page.partition(mark)
    _, end, after = rest.partition(END_MARK)
    if not begin or not end:
        raise ValueError(f"the page lacks {mark} or {END_MARK}")
    return f"{before}{mark}\n\n{measured}\n\n{END_MARK}{after}"
