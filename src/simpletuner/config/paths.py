"""Lookup of paths: in the folder of the file that names them, then in the working directory.

`~` is the home folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_ID_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")
LOCAL_FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", ".json", ".bin")


def find_path(text: str, folder: Path | None, cwd: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the absolute path of what exists, or None, and the paths that were tried.

    Never raises.
    """
    path = os.path.expanduser(text)
    tried = dict.fromkeys(
        os.path.abspath(base / path) for base in (folder, cwd) if base is not None
    )
    return next((place for place in tried if os.path.exists(place)), None), tuple(tried)


def resolve_path(text: str, kind: str, folder: Path | None, cwd: Path) -> tuple[str, str]:
    """Return the absolute path if it exists, else the text; and what is wrong, or "".

    kind: "file" must be a file, "hub" may be a repository, "new" need not exist and stays relative.
    """
    if kind == "new":
        expanded = os.path.expanduser(text)
        if any(character < " " for character in text):  # "C:\new" in JSON is a line break and "ew"
            return expanded, r"has control characters; write \\ or / between folders"
        if expanded.startswith("~"):
            name = text.split("/")[0]
            return expanded, f"{name} is not the home folder of a user; write ./{name} for a folder"
        return expanded, ""
    place, tried = find_path(text, folder, cwd)
    if place is not None:
        is_wrong = kind == "file" and os.path.isdir(place)
        return place, "is a folder, not a file" if is_wrong else ""
    looks_local = text.startswith((".", "/", "~")) or text.endswith(LOCAL_FILE_SUFFIXES)
    if kind == "hub" and not looks_local and HUB_ID_PATTERN.fullmatch(text):
        return text, ""
    return (
        text,
        "does not exist (looked for "
        f"{' or '.join(display_path(Path(place), cwd) for place in tried)})",
    )


def display_path(path: Path, cwd: Path) -> str:
    """Return a short path for messages: relative to the working directory when inside it."""
    absolute = os.path.abspath(cwd / path)
    inside = absolute.startswith(os.path.abspath(cwd) + os.sep)
    return os.path.relpath(absolute, cwd) if inside else absolute
