"""The caption beside a picture: written only over the text that its writer saw."""

from __future__ import annotations

import time
from pathlib import Path

from simpletuner.server.atomic import write_atomically
from simpletuner.server.refusal import refuse
from simpletuner.server.wire.datasets import CaptionWrite

LONGEST = 20_000  # characters; 512 tokens are some 2,500


def read_caption(path: Path | None) -> str | None:
    """The text of a file as it is; None where there is none, or it is not UTF-8."""
    try:
        return None if path is None else path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def write_caption(text: Path, ask: CaptionWrite, trash: Path) -> None:
    """Write the caption file; what was there goes to `trash` first. A blank caption only removes it.

    Raises Refused: 409 when another text is there than ask.before, 422 for a text that cannot be a caption.
    Undoing is writing the old text.
    """
    if len(ask.text) > LONGEST or "\0" in ask.text or any("\ud800" <= one <= "\udfff" for one in ask.text):
        refuse(422, f"a caption is text of at most {LONGEST} characters", "text")
    if read_caption(text) != ask.before:
        refuse(409, "the caption was changed meanwhile; look at it again before you write", "before")
    try:
        if text.is_file():
            kept = trash / str(time.time_ns()) / text.name
            kept.parent.mkdir(parents=True)
            kept.write_bytes(text.read_bytes())
        if ask.text.strip():
            write_atomically(text, ask.text)
        else:
            text.unlink(missing_ok=True)
    except OSError as error:
        refuse(409, f"the caption cannot be written: {error.strerror}")
