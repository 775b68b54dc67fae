"""The .txt file that holds the caption of an image."""

from __future__ import annotations

import shutil
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_bytes
from simpletuner.data.captions import MAX_CAPTION_BYTES
from simpletuner.server.api_errors import abort
from simpletuner.server.schemas.datasets import CaptionWrite
from simpletuner.server.workspace import Workspace

MAX_CAPTION_CHARS = 20_000  # characters of a caption; 512 tokens are some 2,500


def read_caption(path: Path | None) -> str | None:
    """Return the text of a caption file, or None if it is missing or not UTF-8."""
    try:
        return (
            None
            if path is None
            else read_bounded_bytes(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
        )
    except (OSError, UnicodeDecodeError):
        return None


def write_caption(path: Path, request: CaptionWrite, workspace: Workspace) -> None:
    """Write a caption file after moving its old version to the trash.

    A blank text removes the file. Raises ApiError: 409 if the file does not hold request.before,
    422 for an invalid caption.
    """
    if (
        len(request.text) > MAX_CAPTION_CHARS
        or "\0" in request.text
        or any("\ud800" <= char <= "\udfff" for char in request.text)
    ):
        abort(422, f"a caption must be text of at most {MAX_CAPTION_CHARS} characters", "text")
    if read_caption(path) != request.before:
        abort(409, "the caption has been changed elsewhere; reload it before you write", "before")
    if path.is_file():
        shutil.copyfile(path, workspace.make_trash_folder() / path.name)
    if request.text.strip():
        write_atomically(path, request.text)
    else:
        path.unlink(missing_ok=True)
