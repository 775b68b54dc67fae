"""A process that ends when the process that has started it ends, however that happens."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
POLL_S = 1.0
EXIT_CODE = 1


def end_with_parent(parent: int) -> None:
    """End this process when `parent`, the process that has started it, ends.

    On Linux the kernel sends SIGKILL; elsewhere a thread looks for the parent every second. Nothing
    is saved: the checkpoints on the disk are complete at any time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # SIGKILL, because a process that waits for a dead one reacts to nothing else.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it has ended before the kernel was asked
        os._exit(EXIT_CODE)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(EXIT_CODE)
