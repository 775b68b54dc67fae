"""Webhooks: events as raw JSON, or as lines in a Discord channel.

A thread sends them, so that a slow receiver never delays the run.
"""

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

from simpletuner.bounded_files import read_bounded_text
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.event_log import event_to_dict
from simpletuner.events.event_types import Event
from simpletuner.events.formatting import describe_event
from simpletuner.events.sinks import LOG_LEVELS, event_level

MAX_FAILURES = 5  # failures in a row
DISCORD_MAX_CHARS = 2000  # characters of a message
TEXT_FIELDS = ("message_prefix", "auth_token")
MAX_CONFIG_BYTES = 1 << 20
WEBHOOK_FIELDS = {
    "webhook_type",
    "webhook_url",
    "callback_url",
    *TEXT_FIELDS,
    "ssl_no_verify",
    "log_level",
}


@dataclass(frozen=True)
class WebhookConfig:
    """Settings of one webhook.

    auth_token: raw only, sent as a bearer token. level: a value of LOG_LEVELS.
    """

    kind: str
    url: str
    prefix: str
    auth_token: str | None
    verify_tls: bool
    level: int

    @property
    def host(self) -> str:
        """The host, which messages may show; the rest of the address is a secret."""
        return urllib.parse.urlsplit(self.url).hostname or ""


def parse_webhook_config(
    config: object, where: str = "webhook_config"
) -> tuple[WebhookConfig, ...]:
    """Parse an object, a list of objects, or the path of a JSON file with either.

    Raises ConfigError with every problem.
    """
    if isinstance(config, (str, Path)):
        where = str(config)
        try:
            config = json.loads(read_bounded_text(Path(config), MAX_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError([Problem(where, f"cannot be read as JSON: {error}")]) from error
    problems: list[Problem] = []
    hooks = []
    for number, item in enumerate(config if isinstance(config, list) else [config]):
        place = f"{where}[{number}]" if isinstance(config, list) else where
        messages = _find_problems(item)
        problems += [Problem(place, message) for message in messages]
        if not messages and isinstance(item, dict):
            hooks.append(_make_webhook_config(item))
    if problems:
        raise ConfigError(problems)
    return tuple(hooks)


def _find_problems(item: object) -> list[str]:
    if not isinstance(item, dict):
        return ["must be an object with webhook_type and webhook_url"]
    unknown = sorted(item.keys() - WEBHOOK_FIELDS)
    problems = [
        f"{name}: unknown; allowed: {', '.join(sorted(WEBHOOK_FIELDS))}" for name in unknown
    ]
    if item.get("webhook_type") not in ("raw", "discord"):
        problems.append(f"webhook_type = {item.get('webhook_type')!r}; allowed: raw, discord")
    url = item.get("callback_url") or item.get("webhook_url")
    parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        problems.append("webhook_url (or callback_url) must be an http:// or https:// address")
    if item.get("log_level", "info") not in LOG_LEVELS:
        problems.append(f"log_level = {item['log_level']!r}; allowed: {', '.join(LOG_LEVELS)}")
    if not isinstance(item.get("ssl_no_verify", False), bool):
        problems.append("ssl_no_verify must be true or false")
    texts = [name for name in TEXT_FIELDS if not isinstance(item.get(name, ""), (str, type(None)))]
    return problems + [f"{name} must be text" for name in texts]


def _make_webhook_config(item: dict[str, Any]) -> WebhookConfig:
    return WebhookConfig(
        kind=item["webhook_type"],
        url=item.get("callback_url") or item["webhook_url"],
        prefix=item.get("message_prefix") or "",
        auth_token=item.get("auth_token"),
        verify_tls=not item.get("ssl_no_verify", False),
        level=LOG_LEVELS[item.get("log_level", "info")],
    )


class WebhookSink:
    """Sink that sends events to one webhook.

    At most `limit` messages wait; the oldest are dropped when the receiver is slower. After
    MAX_FAILURES failures in a row the next call raises, so that fan_out reports it once and removes
    it.
    """

    def __init__(self, hook: WebhookConfig, limit: int = 256, timeout_s: float = 10.0) -> None:
        self._config, self._timeout_s = hook, timeout_s
        self._queue: queue.Queue[bytes | None] = queue.Queue(limit)
        self._failures, self._reason = 0, ""
        self._thread = threading.Thread(
            target=self._send_queued, name=f"webhook {hook.host}", daemon=True
        )
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if self._failures >= MAX_FAILURES:
            raise ConnectionError(
                f"{self._config.host}: {self._reason}, {MAX_FAILURES} times in a row"
            )
        if event_level(event) < self._config.level:
            return
        self._enqueue(json.dumps(build_payload(self._config, event, time.time())).encode())

    def close(self, wait_s: float = 5.0) -> None:
        """Send the waiting messages, for at most `wait_s` seconds."""
        self._enqueue(None)
        self._thread.join(wait_s)

    def _enqueue(self, body: bytes | None) -> None:
        while True:
            try:
                self._queue.put_nowait(body)
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:
            return  # the sender has taken it meanwhile

    def _send_queued(self) -> None:
        context = ssl.create_default_context()
        if not self._config.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        while (body := self._queue.get()) is not None and self._failures < MAX_FAILURES:
            headers = {"Content-Type": "application/json", "User-Agent": "simpletuner"}
            if self._config.auth_token:
                headers["Authorization"] = f"Bearer {self._config.auth_token}"
            request = urllib.request.Request(self._config.url, body, headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s, context=context):
                    self._failures = 0
            except urllib.error.HTTPError as error:
                self._record_failure(f"HTTP {error.code}")
            except (OSError, ValueError) as error:
                self._record_failure(type(error).__name__)

    def _record_failure(self, reason: str) -> None:
        self._failures, self._reason = self._failures + 1, reason


def build_payload(hook: WebhookConfig, event: Event, t: float) -> dict[str, Any]:
    """Build the body: raw is the record of events.jsonl, discord a message without mentions."""
    if hook.kind == "raw":
        record = event_to_dict(event, t)
        return {**record, "message_prefix": hook.prefix} if hook.prefix else record
    text = f"{hook.prefix} {describe_event(event)}".strip()
    return {"content": text[:DISCORD_MAX_CHARS], "allowed_mentions": {"parse": []}}
