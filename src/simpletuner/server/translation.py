"""Messages in the language that a request asks for, by one catalogue of templates.

Messages are made in English, far from any request: by the loader of the configuration, by the
training process (which only writes events), by the routes. messages.json has the translations of
each template, such as "{} is above learning_rate {}". A message is compared with the templates
when it is serialised for a client, and the values between their words are put into the
translation; a message without a template stays English. A test reads the templates from the source
and compares them with the catalogue.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Receive, Scope, Send

ENGLISH = "en"
LANGUAGES = (ENGLISH, "es", "hi")
MAX_CHARS = 4000  # longer messages are logs or quotations
MIN_LETTERS = 12  # of the words of a template that is specific
MIN_LETTERS_OF_PLAIN = 6
MAX_ATTEMPTS = 200  # readings of a message and its values, which bounds the time
PLACEHOLDER = re.compile(r"\{(n?)\}")
FILLED = re.compile(r"\{(\d*)(?::(\w+))?\}")
# The language of the request that is being answered: serialisers know nothing else of it.
_LANGUAGE: contextvars.ContextVar[str] = contextvars.ContextVar("language", default=ENGLISH)


@dataclass(frozen=True)
class Template:
    """A message with values between its parts.

    numbers: the placeholders, in order, that only digits fill. text: the translation; {} is the
    next value, {1} the second, {:state} the next one as a state of a run.
    """

    parts: tuple[str, ...]
    numbers: tuple[bool, ...]
    text: str

    @property
    def letters(self) -> int:
        return sum(map(str.isalpha, "".join(self.parts)))

    def match(self, message: str) -> list[str] | None:
        """Return the values in the message, each as short as possible; None if it is another one.

        Takes linear time for any message, as a regular expression would not.
        """
        first, *between, last = self.parts
        at, end = len(first), len(message) - len(last)
        if at > end or not (message.startswith(first) and message.endswith(last)):
            return None
        values = []
        for part in between:
            next_at = message.find(part, at, end)
            if next_at < 0:
                return None
            values.append(message[at:next_at])
            at = next_at + len(part)
        values.append(message[at:end])
        fits = all(value.isdigit() for value, digits in zip(values, self.numbers) if digits)
        return values if fits else None


class Catalogue:
    """The messages of one language. rows: template -> translation."""

    def __init__(self, rows: Mapping[str, str]) -> None:
        self._exact = dict(rows)
        # Longer templates first: "{} must be between {}" before "{} must be {}".
        self._templates = sorted(_make_templates(rows), key=lambda row: -row.letters)

    def translate(self, message: str) -> str:
        """Return the message in this language, or as it is where no template fits."""
        if len(message) > MAX_CHARS:
            return message
        return self._translate(message, iter(range(MAX_ATTEMPTS)), nested=False) or message

    def _translate(self, message: str, attempts: Iterator[int], nested: bool) -> str | None:
        return self._whole(message, attempts, nested) or self._parts(message, attempts, nested)

    def _whole(self, message: str, attempts: Iterator[int], nested: bool) -> str | None:
        """Return the translation by the first template that fits. nested: it is a value."""
        if (exact := self._exact.get(message)) is not None:
            return exact
        if next(attempts, None) is None:
            return None
        for template in self._templates:
            values = template.match(message)
            if values is None:
                continue
            texts = [self._translate(value, attempts, nested=True) for value in values]
            if template.letters >= MIN_LETTERS or _is_likely(template, values, texts, nested):
                return self._fill(template.text, values, texts)
        return None

    def _parts(self, message: str, attempts: Iterator[int], nested: bool) -> str | None:
        """Translate what follows "config.json:7:3: " or "rank = 5: ", or the parts of a list."""
        for separator in re.finditer(": ", message):
            head, rest = message[: separator.end()], message[separator.end() :]
            if (text := self._whole(rest, attempts, nested)) is not None:
                return head + text
        for mark in ("\n", "; "):
            parts = message.split(mark)
            if len(parts) == 1:
                continue
            texts = [self._translate(part, attempts, nested) for part in parts]
            if any(text is not None for text in texts):
                return mark.join(text or part for part, text in zip(parts, texts))
        return None

    def _fill(self, text: str, values: Sequence[str], translated: Sequence[str | None]) -> str:
        order = iter(range(len(values)))

        def value_of(match: re.Match[str]) -> str:
            at = int(match[1]) if match[1] else next(order)
            if match[2]:
                return self._exact.get(f"{match[2]} {values[at]}", values[at])
            return translated[at] or values[at]

        return FILLED.sub(value_of, text)


def _is_likely(
    template: Template, values: Sequence[str], texts: Sequence[str | None], nested: bool
) -> bool:
    """Return whether a template of few words fits by more than chance.

    Its values are single words, lists of words, or known themselves; and one of them is known
    where the template has hardly any word ("{}: {} is {}"), unless it is a value ("a or b").
    """
    known = [text is not None for text in texts]
    plain = all(fits or " " not in value.replace(", ", ",") for value, fits in zip(values, known))
    return plain and (nested or any(known) or template.letters >= MIN_LETTERS_OF_PLAIN)


def _make_templates(rows: Mapping[str, str]) -> Iterator[Template]:
    for english, text in rows.items():
        # The end or the start of a sentence, such as "; did you mean '{}'?", is a value of others.
        if english[0] in " ;,":
            english, text = "{}" + english, "{}" + text
        if english[-1] == " ":
            english, text = english + "{}", text + "{}"
        pieces = PLACEHOLDER.split(english)
        if len(pieces) > 1:
            yield Template(tuple(pieces[::2]), tuple(map(bool, pieces[1::2])), text)


@functools.cache
def read_messages() -> Mapping[str, Mapping[str, str]]:
    """Return the catalogue: template -> language -> translation."""
    file = resources.files("simpletuner.server").joinpath("messages.json")
    messages: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return messages


@functools.cache
def catalogue(language: str) -> Catalogue:
    """Return the messages of a language other than English."""
    return Catalogue({english: row[language] for english, row in read_messages().items()})


def translate(message: str, language: str) -> str:
    """Return a message of this program in a language of LANGUAGES."""
    return message if language == ENGLISH else catalogue(language).translate(message)


def to_language_of_request(message: str) -> str:
    """Return a message in the language of the request that is being answered."""
    return translate(message, _LANGUAGE.get())


def preferred_language(accepted: str) -> str:
    """Return the first language of LANGUAGES in an Accept-Language header, else English."""
    ranked = []
    for entry in accepted.split(",")[:20]:
        name, _, weight = entry.strip().partition(";q=")
        try:
            ranked.append((-float(weight or 1), name[:2].lower()))
        except ValueError:
            continue
    ranked.sort(key=lambda pair: pair[0])
    return next((name for _, name in ranked if name in LANGUAGES), ENGLISH)


class LanguageMiddleware:
    """Sets the language of each request, from Accept-Language or a WebSocket's ?language=."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or connection."""
        languages = ""
        if scope["type"] == "http":
            languages = Headers(scope=scope).get("accept-language", "")
        elif scope["type"] == "websocket":  # a browser cannot set its headers
            languages = QueryParams(scope["query_string"]).get("language", "")
        mark = _LANGUAGE.set(preferred_language(languages))
        try:
            await self.app(scope, receive, send)
        finally:
            _LANGUAGE.reset(mark)
