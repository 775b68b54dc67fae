"""Relative paths: beside the file that names them, then in the working directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILE_ENDINGS = (".safetensors", ".sft", ".gguf", ".json", ".bin")


def resolve(text: str, kind: str, folder: Path | None, cwd: Path) -> tuple[str, str]:
    """The absolute path if it exists, else the text as it is and what is wrong ("" for a hub repository)."""
    path = Path(text).expanduser()
    tried = [base / path for base in (folder, cwd) if base is not None]
    for candidate in tried:
        if candidate.exists():
            return os.path.abspath(candidate), ""
    looks_local = text.startswith((".", "/", "~")) or text.endswith(FILE_ENDINGS)
    if kind == "hub" and not looks_local and HUB_ID.fullmatch(text):
        return text, ""
    places = " or ".join(dict.fromkeys(shown(candidate, cwd) for candidate in tried))
    return text, f"does not exist (looked for {places})"


def shown(path: Path, cwd: Path) -> str:
    """Short in messages: relative to the working directory when inside it."""
    absolute = os.path.abspath(cwd / path)
    inside = absolute.startswith(os.path.abspath(cwd) + os.sep)
    return os.path.relpath(absolute, cwd) if inside else absolute
