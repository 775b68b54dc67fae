"""Record every path that Python code writes, by an audit hook, in this process or in its children.

The hook stays for the life of the process, and does nothing without the environment's LOG_VARIABLE.
It does not see what libraries write in C or Rust: compare the folders before and after as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

LOG_VARIABLE = "WRITTEN_PATHS_LOG"
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> the arguments that are changed paths, each with the argument of its folder.
CHANGES = {
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),),
    "os.symlink": ((1, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
    "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
}  # fmt: skip
DATABASE = "sqlite3.connect"  # opens its file in C; the name may be a URI
READ_ONLY = ("mode=ro", "immutable=1")
DEVICES = ("/dev/null", "/dev/tty")
SITE_CUSTOMIZE = """\
import sys
sys.path[:0] = {path!r}
sys.dont_write_bytecode = True
from tests.e2e import written_paths
written_paths.install()
"""


def changed_paths(event: str, arguments: tuple[object, ...]) -> list[str]:
    """Return the paths that an audited call creates, changes or removes."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not isinstance(flags, int) or not flags & WRITE_FLAGS:
            return []
        return [_absolute(path)]
    if event == DATABASE:
        name, _, query = os.fsdecode(arguments[0]).removeprefix("file:").partition("?")  # type: ignore[arg-type]
        read_only = any(mode in query for mode in READ_ONLY)
        return [] if read_only or name == ":memory:" else [_absolute(name)]
    return [
        _absolute(arguments[place], None if folder is None else arguments[folder])
        for place, folder in CHANGES.get(event, ())
        if not isinstance(arguments[place], int)
    ]


def _absolute(path: object, folder: object = None) -> str:
    if isinstance(folder, int) and folder >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))  # type: ignore[arg-type]
    return os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event not in CHANGES and event not in ("open", DATABASE):
        return
    log = os.environ.get(LOG_VARIABLE)
    if log is None:
        return
    paths = [path for path in changed_paths(event, arguments) if path not in (log, *DEVICES)]
    if paths:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, os.fsencode("".join(f"{path}\0" for path in paths)))
        os.close(descriptor)


def install() -> None:
    """Begin to look; only once in a process, because a hook cannot be taken away."""
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)


_installed: list[object] = []


def children_path(folder: Path) -> str:
    """Return a PYTHONPATH with which child processes are watched too."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE_CUSTOMIZE.format(path=sys.path))
    return str(folder)


def read_log(log: Path) -> set[str]:
    return {os.fsdecode(path) for path in log.read_bytes().split(b"\0") if path}
