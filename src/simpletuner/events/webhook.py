"""Events to a URL: raw JSON, or a line in a Discord channel. Sent by a thread, never in the run's way."""

from __future__ import annotations

import json
import queue
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.errors import ConfigError, Problem
from simpletuner.events.log import to_record
from simpletuner.events.sinks import LEVELS, level_of
from simpletuner.events.types import Event
from simpletuner.events.wording import describe

GIVE_UP_AFTER = 5  # failures in a row
DISCORD_LIMIT = 2000  # characters of a message
TEXTS = ("message_prefix", "auth_token")
FIELDS = {"webhook_type", "webhook_url", "callback_url", *TEXTS, "ssl_no_verify", "log_level"}


@dataclass(frozen=True)
class Hook:
    """Where to send what. auth_token: raw only, sent as a bearer token. level: a value of LEVELS."""

    kind: str
    url: str
    prefix: str
    auth_token: str | None
    verify: bool
    level: int

    @property
    def host(self) -> str:
        """What may be shown: the rest of the address is a secret."""
        return urllib.parse.urlsplit(self.url).hostname or ""


def parse(config: object, where: str = "webhook_config") -> tuple[Hook, ...]:
    """An object, a list of them, or the path of a JSON file with either. ConfigError with every problem."""
    if isinstance(config, (str, Path)):
        where = str(config)
        try:
            config = json.loads(Path(config).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError([Problem(where, f"cannot be read as JSON: {error}")]) from error
    problems: list[Problem] = []
    hooks = []
    for number, item in enumerate(config if isinstance(config, list) else [config]):
        place = f"{where}[{number}]" if isinstance(config, list) else where
        found = _problems(item)
        problems += [Problem(place, what) for what in found]
        if not found and isinstance(item, dict):
            hooks.append(_hook(item))
    if problems:
        raise ConfigError(problems)
    return tuple(hooks)


def _problems(item: object) -> list[str]:
    if not isinstance(item, dict):
        return ["must be an object with webhook_type and webhook_url"]
    unknown = sorted(item.keys() - FIELDS)
    found = [f"{name}: unknown; allowed are {', '.join(sorted(FIELDS))}" for name in unknown]
    if item.get("webhook_type") not in ("raw", "discord"):
        found.append(f"webhook_type = {item.get('webhook_type')!r}; allowed are raw, discord")
    url = item.get("callback_url") or item.get("webhook_url")
    parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        found.append("webhook_url (or callback_url) must be an http:// or https:// address")
    if item.get("log_level", "info") not in LEVELS:
        found.append(f"log_level = {item['log_level']!r}; allowed are {', '.join(LEVELS)}")
    if not isinstance(item.get("ssl_no_verify", False), bool):
        found.append("ssl_no_verify must be true or false")
    texts = [name for name in TEXTS if not isinstance(item.get(name, ""), (str, type(None)))]
    return found + [f"{name} must be text" for name in texts]


def _hook(item: dict[str, Any]) -> Hook:
    return Hook(
        kind=item["webhook_type"],
        url=item.get("callback_url") or item["webhook_url"],
        prefix=item.get("message_prefix") or "",
        auth_token=item.get("auth_token"),
        verify=not item.get("ssl_no_verify", False),
        level=LEVELS[item.get("log_level", "info")],
    )


class Webhook:
    """Sink. At most `limit` messages wait; when the other side is slower than that, the oldest are dropped.

    After GIVE_UP_AFTER failures in a row the next call raises, so that fan_out reports it once and drops it.
    """

    def __init__(self, hook: Hook, limit: int = 256, timeout_s: float = 10.0) -> None:
        self._hook, self._timeout_s = hook, timeout_s
        self._waiting: queue.Queue[bytes | None] = queue.Queue(limit)
        self._failures, self._reason = 0, ""
        self._thread = threading.Thread(target=self._work, name=f"webhook {hook.host}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if self._failures >= GIVE_UP_AFTER:
            raise ConnectionError(f"{self._hook.host}: {self._reason}, {GIVE_UP_AFTER} times in a row")
        if level_of(event) < self._hook.level:
            return
        self._offer(json.dumps(payload(self._hook, event, time.time())).encode())

    def close(self, wait_s: float = 5.0) -> None:
        """Send what waits, but not for longer than `wait_s`."""
        self._offer(None)
        self._thread.join(wait_s)

    def _offer(self, body: bytes | None) -> None:
        while True:
            try:
                self._waiting.put_nowait(body)
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._waiting.get_nowait()
        except queue.Empty:
            return  # the sender was quicker

    def _work(self) -> None:
        context = ssl.create_default_context()
        if not self._hook.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        while (body := self._waiting.get()) is not None and self._failures < GIVE_UP_AFTER:
            headers = {"Content-Type": "application/json", "User-Agent": "simpletuner"}
            if self._hook.auth_token:
                headers["Authorization"] = f"Bearer {self._hook.auth_token}"
            request = urllib.request.Request(self._hook.url, body, headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s, context=context):
                    self._failures = 0
            except urllib.error.HTTPError as error:
                self._failed(f"HTTP {error.code}")
            except (OSError, ValueError) as error:
                self._failed(type(error).__name__)

    def _failed(self, reason: str) -> None:
        self._failures, self._reason = self._failures + 1, reason


def payload(hook: Hook, event: Event, t: float) -> dict[str, Any]:
    """raw: the record of events.jsonl. discord: one message that can ping nobody."""
    if hook.kind == "raw":
        record = to_record(event, t)
        return {**record, "message_prefix": hook.prefix} if hook.prefix else record
    text = f"{hook.prefix} {describe(event)}".strip()
    return {"content": text[:DISCORD_LIMIT], "allowed_mentions": {"parse": []}}
