"""Search for a text in a log, line by line from the start, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from simpletuner.server.file_reader import open_regular_file
from simpletuner.server.schemas.runs import LogLine, LogMatches

MAX_LINE_BYTES = 1 << 16  # a longer line counts as several
MAX_LINE_CHARS = 1000  # of a match that is shown


def search_log(path: Path, text: str, limit: int) -> LogMatches:
    """Return the last `limit` lines that contain the text; the case of letters does not matter."""
    wanted = text.casefold()
    # Bytes are compared where that is the same, which is ten times as fast.
    plain = wanted.encode() if wanted.isascii() else None
    matches: deque[LogLine] = deque(maxlen=limit)
    count = 0
    with open_regular_file(path) as file:
        for number, line in _numbered_lines(file) if file is not None else ():
            if plain is not None and line.isascii():
                if plain not in line.lower():
                    continue
            elif wanted not in line.decode("utf-8", "replace").casefold():
                continue
            count += 1
            shown = line.decode("utf-8", "replace").rstrip("\r\n")[:MAX_LINE_CHARS]
            matches.append(LogLine(number=number, text=shown))
    return LogMatches(count=count, lines=list(matches))


def _numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) up to the size that the file has now; a line may come in parts."""
    left = os.fstat(file.fileno()).st_size
    number = 1
    while left > 0:
        line = file.readline(min(MAX_LINE_BYTES, left))
        if not line:
            return
        left -= len(line)
        yield number, line
        number += line.endswith(b"\n")
