"""A JSON file of the server's folder that another process may write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from simpletuner.server.watched_file import WatchedJsonFile


def parse(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def test_what_another_process_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.json"
    first, second = WatchedJsonFile(path, parse), WatchedJsonFile(path, parse)
    assert first.read() == {}
    first.write({"a": 1})
    assert second.read() == first.read() == {"a": 1}
    second.write({"a": 1, "b": 22})
    assert first.read() == {"a": 1, "b": 22}
    path.write_text('{"c": 3, "d": "of another version"}')
    assert first.read() == {"c": 3}
    path.write_text("[torn")
    assert first.read() == {}
    path.unlink()
    assert second.read() == {}


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    parsed: list[Any] = []
    file = WatchedJsonFile(path, lambda value: parsed.append(value))
    path.write_text('{"a": 1}')
    os.utime(path, (5, 5))
    file.read()
    file.read()
    assert parsed == [1]
