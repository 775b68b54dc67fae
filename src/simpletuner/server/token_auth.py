"""Token authentication for a server that other machines can reach.

There are three secrets of 256 bits each: the token, for scripts and for logging in; the login code,
which works once; and the key from which the cookie is derived together with the token, so that the
cookie cannot be guessed even if the user chose a weak token.
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
    """Return the secret in a file, which is created on first use and readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        secret = path.read_text(encoding="ascii").strip()
        if len(secret) >= 16:
            return secret
        path.unlink()
        return read_or_create_secret(path)
    secret = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secret + "\n")
    return secret


class TokenAuth:
    """Compare secrets in constant time, and delay an address after repeated wrong tokens."""

    def __init__(self, token: str, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.token = token
        self.cookie = hmac.new(key.encode(), token.encode(), hashlib.sha256).hexdigest()
        self.login_code: str | None = secrets.token_urlsafe(32)
        self.clock = clock
        self.failed_attempts: dict[str, tuple[int, float]] = {}

    def accepts_cookie(self, cookie: str) -> bool:
        """Return True if the browser has logged in.

        A wrong cookie is not counted as an attempt: it has 256 bits, and it may just be out of
        date.
        """
        return hmac.compare_digest(cookie.encode(), self.cookie.encode())

    def retry_delay_s(self, address: str) -> float:
        """Return the seconds that this address must wait before its next attempt."""
        attempts, last = self.failed_attempts.get(address, (0, 0.0))
        if attempts < FREE_ATTEMPTS:
            return 0.0
        pause = min(2.0 ** (attempts - FREE_ATTEMPTS + 1), MAX_RETRY_DELAY_S)
        return max(0.0, last + pause - self.clock())

    def accepts_token(self, address: str, secret: str) -> bool:
        """Check the token or the one-time login code, and count a wrong one as a failed attempt."""
        is_login_code = self.login_code is not None and hmac.compare_digest(
            secret.encode(), self.login_code.encode()
        )
        if is_login_code:
            self.login_code = None
        if is_login_code or hmac.compare_digest(secret.encode(), self.token.encode()):
            self.failed_attempts.pop(address, None)
            return True
        attempts, _ = self.failed_attempts.pop(address, (0, 0.0))
        while len(self.failed_attempts) >= MAX_TRACKED_ADDRESSES:
            self.failed_attempts.pop(next(iter(self.failed_attempts)))
        self.failed_attempts[address] = (attempts + 1, self.clock())
        return False
