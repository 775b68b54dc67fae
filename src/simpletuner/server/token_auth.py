"""The token that opens a server which others can reach.

Three secrets, each 256 bit: the token, for scripts and for logging in; the launch word, which logs in once
and is gone; the key that makes the browser's cookie from the token, so that a cookie cannot be guessed where
a person chose a weak token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

FREE_ATTEMPTS = 10
MAX_RETRY_DELAY_S = 300.0
MAX_TRACKED_ADDRESSES = 1024


def read_or_create_secret(path: Path) -> str:
    """The secret in that file, made on first use; nobody else can read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        found = path.read_text(encoding="ascii").strip()
        if len(found) >= 16:
            return found
        path.unlink()
        return read_or_create_secret(path)
    made = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(made + "\n")
    return made


class TokenAuth:
    """Compares in constant time, and makes whoever keeps guessing wait longer and longer."""

    def __init__(self, token: str, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.token = token
        self.cookie = hmac.new(key.encode(), token.encode(), hashlib.sha256).hexdigest()
        self.login_code: str | None = secrets.token_urlsafe(32)
        self.clock = clock
        self.failed_attempts: dict[str, tuple[int, float]] = {}

    def accepts_cookie(self, cookie: str) -> bool:
        """Whether this browser has logged in. Not counted as a try: a cookie is 256 bit and may be stale."""
        return hmac.compare_digest(cookie.encode(), self.cookie.encode())

    def retry_delay_s(self, address: str) -> float:
        """How long this address has to wait before its next try."""
        tries, last = self.failed_attempts.get(address, (0, 0.0))
        if tries < FREE_ATTEMPTS:
            return 0.0
        pause = min(2.0 ** (tries - FREE_ATTEMPTS + 1), MAX_RETRY_DELAY_S)
        return max(0.0, last + pause - self.clock())

    def accepts_token(self, address: str, word: str) -> bool:
        """One try with the token or the launch word."""
        launched = self.login_code is not None and hmac.compare_digest(
            word.encode(), self.login_code.encode()
        )
        if launched:
            self.login_code = None
        if launched or hmac.compare_digest(word.encode(), self.token.encode()):
            self.failed_attempts.pop(address, None)
            return True
        tries, _ = self.failed_attempts.pop(address, (0, 0.0))
        while len(self.failed_attempts) >= MAX_TRACKED_ADDRESSES:
            self.failed_attempts.pop(next(iter(self.failed_attempts)))
        self.failed_attempts[address] = (tries + 1, self.clock())
        return False
